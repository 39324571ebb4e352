"""Asking the model hub for files, with an answer within seconds where there is none."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from qlora_kit.errors import UserError

CONNECT_TIMEOUT_S = 5.0
OFFLINE_REMEDY = "Give a local folder, or --weights random for a known architecture, which needs no download."


def hub_reachable() -> bool:
    """Whether the hub answers at all; asked first, because its client retries for half a minute."""
    from huggingface_hub import constants

    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # only the client knows the way
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def fetch_model_file(model: str, filename: str, revision: str | None, setting: str = "--model") -> Path:
    """The local path of one file of a hub model, downloaded if need be.

    Raises `UserError` for a name that the hub does not know, that needs a login, or where no hub is reached.
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
            raise UserError.of(setting, model, "is no local folder, and the hub cannot be reached", OFFLINE_REMEDY)
        return Path(hf_hub_download(model, filename, revision=revision, etag_timeout=CONNECT_TIMEOUT_S))
    except HFValidationError:
        raise UserError.of(
            setting, model, "is no local folder, and no name that the hub allows", OFFLINE_REMEDY
        ) from None
    except GatedRepoError:
        remedy = "Accept its terms on the hub, then log in with `hf auth login`."
        raise UserError.of(setting, model, "needs a login and its licence accepted", remedy) from None
    except RepositoryNotFoundError:
        rule = "is no local folder, and the hub knows no such public model"
        raise UserError.of(
            setting, model, rule, f"Check the name, or log in if it is private. {OFFLINE_REMEDY}"
        ) from None
    except RevisionNotFoundError:
        raise UserError.of("--revision", revision, f"is no revision of {model}", "Check the name on the hub.") from None
    except LocalEntryNotFoundError:
        raise UserError.of(setting, model, "is no local folder, and the hub does not answer", OFFLINE_REMEDY) from None
    except EntryNotFoundError:
        raise UserError.of(setting, model, f"has no {filename} on the hub", "Choose a transformers model.") from None


def fetch_model_folder(
    model: str, revision: str | None, patterns: tuple[str, ...], setting: str = "--model", probe: str = "config.json"
) -> Path:
    """The local folder of a hub model with the files that match `patterns`, downloaded if need be.

    The file `probe` it must have.

    Raises `UserError` as `fetch_model_file`, and where the hub cannot be reached and files are missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch_model_file(model, probe, revision, setting)
    try:
        offline = not hub_reachable()
        found = snapshot_download(model, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
    except LocalEntryNotFoundError:
        raise UserError.of(setting, model, "is not here in full, and the hub does not answer", OFFLINE_REMEDY) from None
    return Path(found)
