"""The tokenizer of a base, or the one set instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit import demo
from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from qlora_kit.model.source import first_line, has_tokenizer, model_source


def load_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that `config.tokenizer` names, or the model's own; random weights without one use the demo's.

    Raises `UserError` if there is none, if it cannot be read, or if it needs a package that is missing.
    """
    from transformers import AutoTokenizer

    source, setting = _tokenizer_source(config)
    folder = Path(source)
    if folder.is_dir() and not has_tokenizer(folder):
        raise UserError.of(setting, source, "the folder has no tokenizer.json", "Give a folder that has one.")
    if not folder.is_dir():
        hub.fetch_model_file(source, "tokenizer_config.json", config.revision, setting)
    try:
        revision = config.revision if source == model_source(config) else None
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    except ImportError as error:
        raise _lacks_package(setting, source, error) from None
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError.of(
            setting,
            source,
            f"its tokenizer cannot be read ({first_line(error)})",
            "Give a folder with tokenizer.json and tokenizer_config.json.",
        ) from None


def _lacks_package(setting: str, source: str, error: ImportError) -> UserError:
    """The error for a tokenizer whose package is missing: Marian's needs sentencepiece."""
    if "sentencepiece" in str(error).lower():
        rule, remedy = "its tokenizer needs the package sentencepiece", "Install it: pip install sentencepiece"
    else:
        rule, remedy = f"its tokenizer needs a package that is missing ({first_line(error)})", "Install it."
    return UserError.of(setting, source, rule, remedy)


def _tokenizer_source(config: BaseConfig) -> tuple[str, str]:
    """The folder or hub id of the tokenizer, and the setting that it comes from."""
    if config.tokenizer is not None:
        return (str(demo.base_folder()) if config.tokenizer == "demo" else config.tokenizer), "tokenizer"
    folder = Path(model_source(config))
    if config.weights == "random" and not (folder.is_dir() and has_tokenizer(folder)):
        return str(demo.base_folder()), "model"  # any text will do
    return str(folder), "model"
