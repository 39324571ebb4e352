"""What a release holds beside its weights: configuration, tokenizer, generation settings, licence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit import runs
from qlora_kit.release.quantize import Quantization
from qlora_kit.release.source import read_json

CONFIG_FILE = "config.json"
# what a tokenizer's folder may hold, by the names that transformers gives
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
BASE_FILES = ("generation_config.json",)
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


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
    config = read_json(base / CONFIG_FILE, "--base", str(base))
    config.pop("torch_dtype", None)  # its name before transformers 5
    config["dtype"] = dtype
    if not with_code:
        config.pop("auto_map", None)
    if untied:
        config["tie_word_embeddings"] = False
    if pack is not None:
        config["quantization_config"] = _quantization_config(dtype, pack, heads)
    config.update(fields or {})
    runs.write_json(folder / CONFIG_FILE, config)


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


def copy_side_files(base: Path, tokenizers: Iterable[Path], folder: Path, with_code: bool) -> None:
    """Copy the tokenizer of the first of `tokenizers` that has one, and the base's other files that a server needs.

    Code that comes with the base is copied only where the user trusts it (`with_code`).
    """
    patterns = [*LICENCE_PATTERNS, *(["*.py"] if with_code else [])]
    names = set(BASE_FILES) | {file.name for pattern in patterns for file in base.glob(pattern)}
    for name in sorted(names):
        _copy(base / name, folder)
    for tokenizer in tokenizers:
        if any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            for name in TOKENIZER_FILES:
                _copy(tokenizer / name, folder)
            return


def _copy(file: Path, folder: Path) -> None:
    if file.is_file():
        runs.write_bytes(folder / file.name, file.read_bytes())


def licence_of(base: Path) -> str | None:
    """The licence that the base's own card names; None where it names none."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return None
    fields = dict(line.split(":", 1) for line in text[4:].split("\n---", 1)[0].splitlines() if ":" in line)
    name = fields.get("license_name", fields.get("license", "")).strip().strip("'\"")
    return name or None
