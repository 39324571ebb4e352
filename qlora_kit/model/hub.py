"""Fetches files from the model hub, and fails within seconds if it cannot be reached."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from qlora_kit.errors import UserError, named

CONNECT_TIMEOUT_S = 5.0
OFFLINE_REMEDY = (
    f"Give a local folder, or {named('weights', 'random')} with a known architecture, which needs no download."
)
CHECK_NAME = "Check the name, or log in if it is private."
UNKNOWN_REMEDY = f"{CHECK_NAME} {OFFLINE_REMEDY}"


def hub_reachable() -> bool:
    """Whether the hub answers; checked first, because its client retries for half a minute."""
    from huggingface_hub import constants

    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # only the client knows how to use it
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def fetch_model_file(model: str, filename: str, revision: str | None, setting: str = "model") -> Path:
    """The local path of one file of a hub model, downloaded if need be.

    Raises `UserError` if the hub does not know the name, wants a login, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(model, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if not hub_reachable():
            raise UserError.of(setting, model, "is not a local folder, and the hub cannot be reached", OFFLINE_REMEDY)
        return Path(hf_hub_download(model, filename, revision=revision, etag_timeout=CONNECT_TIMEOUT_S))
    except HFValidationError:
        raise UserError.of(
            setting, model, "is not a local folder, and not a valid name on the hub", OFFLINE_REMEDY
        ) from None
    except GatedRepoError:
        remedy = "Accept its terms on the hub, then log in with `hf auth login`."
        raise UserError.of(setting, model, "needs a login, and its licence must be accepted", remedy) from None
    except RepositoryNotFoundError:
        rule = "is not a local folder, and the hub has no such public model"
        raise UserError.of(setting, model, rule, UNKNOWN_REMEDY) from None
    except RevisionNotFoundError:
        raise UserError.of(
            "revision", revision, f"is not a revision of {model}", "Check the name on the hub."
        ) from None
    except LocalEntryNotFoundError:
        raise UserError.of(
            setting, model, "is not a local folder, and the hub does not answer", OFFLINE_REMEDY
        ) from None
    except EntryNotFoundError:
        raise UserError.of(setting, model, f"has no {filename} on the hub", "Choose a transformers model.") from None


def fetch_model_folder(
    model: str, revision: str | None, patterns: tuple[str, ...], setting: str = "model", probe: str = "config.json"
) -> Path:
    """The local folder of a hub model with the files that match `patterns`, downloaded if need be.

    It must have the file `probe`.

    Raises `UserError` as `fetch_model_file`, and if files are missing and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch_model_file(model, probe, revision, setting)
    try:
        offline = not hub_reachable()
        found = snapshot_download(model, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
    except LocalEntryNotFoundError:
        raise UserError.of(
            setting, model, "is not cached completely, and the hub does not answer", OFFLINE_REMEDY
        ) from None
    return Path(found)


def remedies(otherwise: str) -> dict[str, str]:
    """The remedies of faults here, by the ones in whose place they stand, where random weights do not help."""
    return {OFFLINE_REMEDY: otherwise, UNKNOWN_REMEDY: f"{CHECK_NAME} {otherwise}"}
