"""The transformer blocks of a model, by the names of its weights and in its structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def block_of(name: str) -> int | None:
    """The number of the block that a layer or weight is in: the first number in its name; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def find_blocks(model: Any) -> list[nn.Module]:
    """The transformer blocks in their order: the longest list of modules, of those that transformers can checkpoint.

    Empty where the model has none; older architectures have a list that cannot be checkpointed.
    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    blocks = [m for m in lists if all(isinstance(b, GradientCheckpointingLayer) for b in m)]
    return max(blocks or lists, key=len, default=[])
