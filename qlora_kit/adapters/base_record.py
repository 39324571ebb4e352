"""The record in an adapter's folder of the base that it was trained on: the folder may be copied away from its run.

PEFT's own settings name the base, but neither its content nor its quantization.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.system import files

RECORD_FILE = "trained_base.json"  # beside the weights; PEFT takes no notice of it
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class TrainedBase:
    """The base of an adapter: its content hash (`model.source.hash_base`), and how it was held and loaded."""

    model: str
    revision: str | None
    hash: str
    bits: int
    quant_type: str
    double_quant: bool
    dtype: str  # as torch calls it

    @classmethod
    def of(cls, settings: BaseConfig, content_hash: str, dtype: str) -> TrainedBase:
        """The record of a base that was loaded by `settings`, its plain weights in `dtype`."""
        own = settings
        return cls(
            model=own.model,
            revision=own.revision,
            hash=content_hash,
            bits=own.bits,
            quant_type=own.quant_type,
            double_quant=own.double_quant,
            dtype=dtype,
        )

    @property
    def held(self) -> dict[str, object]:
        """How it was held, by setting; what is of no effect is left out."""
        quantized = {"quant_type": self.quant_type, "double_quant": self.double_quant} if self.bits == 4 else {}
        return {"bits": self.bits, **quantized}

    def write(self, folder: Path) -> None:
        """Write it into the adapter's folder."""
        files.write_json(folder / RECORD_FILE, asdict(self))


def read_record(folder: Path, setting: str) -> TrainedBase | None:
    """The record of the base in an adapter's `folder`; None if there is none, as with adapters made elsewhere.

    Raises `UserError` for `setting` if the record cannot be used.
    """
    file = folder / RECORD_FILE
    try:
        return _parsed(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        rule = f"its {RECORD_FILE} cannot be read ({error})"
        raise UserError.of(
            setting, str(folder), rule, "Copy the adapter's folder again, or remove that file."
        ) from None


def _parsed(content: Any) -> TrainedBase:
    """The record in `content`. Raises `TypeError` or `ValueError`."""
    if not isinstance(content, dict):
        raise ValueError("not a mapping")
    record = TrainedBase(**content)
    texts = (record.model, record.hash, record.revision or "")
    fine = all(isinstance(text, str) for text in texts) and type(record.bits) is int and record.bits in (4, 8, 16, 32)
    fine = fine and record.quant_type in ("nf4", "fp4") and isinstance(record.double_quant, bool)
    if not (fine and record.dtype in DTYPES):
        raise ValueError("not as a run writes it")
    return record
