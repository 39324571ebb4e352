"""Names on a hub; no test reaches one: its answers are raised by a stand-in for the client's download."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from qlora_kit.errors import UserError
from qlora_kit.model import hub


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "hf auth login"),
        (RepositoryNotFoundError, "has no such public model"),
        (RevisionNotFoundError, "revision = "),
    ],
)
def test_what_the_hub_answers_becomes_one_message_with_a_remedy(monkeypatch, error, message):
    def download(*_, **__):
        raise error.__new__(error)  # made bare: its constructor's arguments differ between versions

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=message):
        hub.fetch_model_file("owner/name", "config.json", "main")


def test_offline_mode_is_not_reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.hub_reachable()


def test_an_impossible_name_is_told_apart(monkeypatch):
    with pytest.raises(UserError, match="not a valid name on the hub"):
        hub.fetch_model_file("a/b/c", "config.json", None)
