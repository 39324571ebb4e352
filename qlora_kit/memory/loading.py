"""The memory that loading a model takes besides the model itself.

Weights are loaded and quantized one by one (transformers reads without threads then, and random weights are drawn one
layer at a time). So besides what is loaded already, there is one weight in 16 bits with the buffers of its
quantization. Weights that are not quantized take no more than in the loaded model. Source: transformers 5.13 to 5.23,
`core_model_loading.py`; bitsandbytes 0.50, `nn/modules.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qlora_kit.memory import kernels
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.track import MemoryTracker, overall_peak

META = torch.device("meta")


def quantizing_bytes(model: Any, results: MetaResults) -> int:
    """The most bytes that quantizing a weight of `model` (on `meta`) takes besides its result; 0 if none is quantized.

    bitsandbytes' own functions are run on a weight of each shape, and followed like a step.
    """
    return max((_beside_result(*kind, results) for kind in set(_quantized(model))), default=0)


Kind = tuple[type, tuple[int, ...], torch.dtype, bool, tuple[tuple[str, Any], ...]]


def _quantized(model: Any) -> Iterator[Kind]:
    """Of each weight of `model` that was quantized: class, shape and dtype before, transposition, settings."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        transposed = getattr(module, "source_cls", None) is Conv1D  # stored in × out, and copied the other way
        if state is not None:
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            settings = tuple((name, getattr(weight, name)) for name in names)
            yield type(weight), tuple(state.shape), state.dtype, transposed, settings
        elif hasattr(weight, "SCB"):
            yield type(weight), tuple(weight.shape), torch.bfloat16, transposed, (("has_fp16_weights", False),)


def _beside_result(
    kind: type,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    transposed: bool,
    settings: tuple[tuple[str, Any], ...],
    results: MetaResults,
) -> int:
    tracker = MemoryTracker("meta", stand_ins=kernels.stand_ins(), run=results.run)
    with tracker:
        arrived = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=META)
        value = arrived.T if transposed else arrived
        made = kind(value, requires_grad=False, **dict(settings))._quantize(META)
        del arrived, value
    left_bytes = tracker.live_bytes
    del made
    return overall_peak(tracker.events).n_bytes - left_bytes


def loading_components(components: Mapping[str, int], quantizing: int, trains_factors: bool) -> dict[str, int]:
    """The live bytes by kind at the peak of loading, from those of the loaded model.

    The peak is either while the last weight of the base is quantized, before there are factors, or when the factors,
    created in fp32 one by one, are cast to their dtype and copied into their buffer: twice their bytes.
    """
    factors = components.get("adapters", 0) if trains_factors else 0
    if quantizing > 2 * factors:
        return {**components, "adapters": 0, "workspaces": components.get("workspaces", 0) + quantizing}
    return {**components, "workspaces": components.get("workspaces", 0) + factors}
