"""The files of a release besides its weights: configuration, tokenizer, generation settings, licence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_kit import demo
from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model import hub
from qlora_kit.model.source import LICENCE_PATTERNS, VOCABULARY_PATTERNS, has_tokenizer
from qlora_kit.release.files.read import read_json
from qlora_kit.release.quantize import Quantization
from qlora_kit.system import files

CONFIG_FILE = "config.json"
# what a tokenizer's folder may hold, by the names that transformers gives
TOKENIZER_PATTERNS = (
    *VOCABULARY_PATTERNS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "source.spm",  # of Marian, beside vocab.json
    "target.spm",
    "target_vocab.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
GENERATION_FILE = "generation_config.json"
LICENCE_FIELDS = ("license", "license_name", "license_link")  # of a card, as the hub names them


def write_config(
    base: Path,
    folder: Path,
    dtype: str,
    untied: bool,
    pack: Quantization | None,
    with_code: bool,
    heads: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write the base's `config.json` as it is, but for the dtype and the quantization of the release, and `fields`.

    Code of the base's own is named in it only where it comes along (`with_code`). The modules `heads` are never
    quantized.
    """
    config = read_json(base / CONFIG_FILE, "base", str(base))
    config.pop("torch_dtype", None)  # its name before transformers 5
    config["dtype"] = dtype
    if not with_code:
        config.pop("auto_map", None)
    if untied:
        config["tie_word_embeddings"] = False
    if pack is not None:
        config["quantization_config"] = _quantization_config(dtype, pack, heads)
    config.update(fields or {})
    files.write_json(folder / CONFIG_FILE, config)


def _quantization_config(dtype: str, pack: Quantization, heads: Sequence[str]) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=pack.quant_type,
        bnb_4bit_use_double_quant=pack.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(heads) or None,
    ).to_dict()
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def find_tokenizer(config: BaseConfig, adapters: Iterable[Path], base: Path) -> Path | None:
    """The folder of the tokenizer that belongs to a release; None where there is none.

    It is the one that `config.tokenizer` names, else that of the first adapter that has one, else the base's.
    Raises `UserError` if that one cannot be found.
    """
    if config.tokenizer is not None:
        return _named_tokenizer(config, config.tokenizer)
    return next((folder for folder in (*adapters, base) if has_tokenizer(folder)), None)


def _named_tokenizer(config: BaseConfig, name: str) -> Path:
    """The folder of the tokenizer `name`: a folder, a hub id, or "demo"."""
    if name == "demo":
        return demo.base_folder()
    if Path(name).is_dir():
        if not has_tokenizer(Path(name)):
            raise UserError.of("tokenizer", name, "the folder has no tokenizer.json", "Give a folder that has one.")
        return Path(name)
    revision = config.revision if name == config.model else None
    probe = "tokenizer_config.json"
    return hub.fetch_model_folder(name, revision, TOKENIZER_PATTERNS, "tokenizer", probe)


def copy_side_files(base: Path, tokenizer: Path | None, folder: Path, with_code: bool) -> None:
    """Copy the tokenizer in the folder `tokenizer`, and the base's other files that a server needs.

    Code that comes with the base is copied only where the user trusts it (`with_code`).
    """
    patterns = [GENERATION_FILE, *LICENCE_PATTERNS, *(["*.py"] if with_code else [])]
    _copy(base, patterns, folder)
    if tokenizer is not None:
        _copy(tokenizer, TOKENIZER_PATTERNS, folder)


def _copy(source: Path, patterns: Iterable[str], folder: Path) -> None:
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        files.write_bytes(target, file.read_bytes())


def licence_of(folder: Path) -> dict[str, Any]:
    """What the card in `folder` says of its licence: those of `LICENCE_FIELDS` that stand there."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        fields = yaml.safe_load(parts[1])
    except (yaml.YAMLError, RecursionError):
        return {}
    found = {name: fields.get(name) for name in LICENCE_FIELDS} if isinstance(fields, dict) else {}
    return {name: value for name, value in found.items() if _is_text(value) and value}


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def licence_text(licence: Mapping[str, Any]) -> str | None:
    """The licence in a word: its own name, or its identifier on the hub."""
    name = licence.get("license_name", licence.get("license"))
    return ", ".join(name) if isinstance(name, list) else name
