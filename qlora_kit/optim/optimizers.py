"""The optimizers by their names: the one table that a run, its plan and the help of `--optim` read.

It names files and imports none of them, so that whoever only needs the names stays light.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import torch

    from qlora_kit.config.settings import RunConfig
    from qlora_kit.optim.kind import OptimizerKind

OPTIMIZERS: Mapping[str, str] = {  # a file of this folder, and the `OptimizerKind` in it
    "paged_adamw_8bit": "bnb:PAGED_ADAMW_8BIT",
    "paged_adamw_32bit": "bnb:PAGED_ADAMW_32BIT",
    "adamw": "adamw:ADAMW",
    "adamw_8bit": "bnb:ADAMW_8BIT",
    "lion_8bit": "bnb:LION_8BIT",
    "sgd": "sgd:SGD",
}


def check_optim(name: str | None) -> None:
    """Check that `name` is an optimizer, or unset. Raises `UserError` with the known names."""
    if name is not None and name not in OPTIMIZERS:
        raise UserError.of("optim", name, "is not a known optimizer", f"Known: {', '.join(OPTIMIZERS)}.")


def resolve_optim(config: RunConfig, device: torch.device) -> str:
    """The optimizer: as told, or by default paged 8-bit AdamW at 4 bits on CUDA, else torch's AdamW.

    On a CPU bitsandbytes' 8-bit kernels compile for seconds at every new shape and nothing pages.
    Raises `UserError` for a name that is none of `OPTIMIZERS`.
    """
    check_optim(config.optim.optim)
    if config.optim.optim is not None:
        return config.optim.optim
    return "paged_adamw_8bit" if config.base.bits == 4 and device.type == "cuda" else "adamw"


def optimizer_named(name: str) -> OptimizerKind:
    """The optimizer `name`, one of `OPTIMIZERS`; imports its file."""
    file, kind = OPTIMIZERS[name].split(":")
    found: OptimizerKind = getattr(importlib.import_module(f"qlora_kit.optim.{file}"), kind)
    return found
