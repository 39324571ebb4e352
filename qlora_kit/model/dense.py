"""The weight that a linear layer computes with, whatever it is held in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dense_weight(layer: Any) -> torch.Tensor:
    """The weight (out × in) of a linear layer in 4, 8, 16 or 32 bits, of transformers' `Conv1D` too.

    A quantized one comes in the dtype that bitsandbytes dequantizes it to; any other shares memory with the layer's.
    """
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight
    if hasattr(weight, "quant_state"):
        dense: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if hasattr(weight, "SCB"):  # the scales move from the weight to the layer when it first runs
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        values: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
        return values
    plain: torch.Tensor = weight.detach()
    return plain.T if isinstance(layer, Conv1D) else plain
