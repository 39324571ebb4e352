"""The device of a run and the dtype that it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError, named

if TYPE_CHECKING:
    import torch


def resolve_device(device: str) -> torch.device:
    """The device to run on; `auto` is CUDA if there is one. Raises `UserError` if `cuda` is asked for and missing."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        remedy = f"Use {named('device', 'cpu')} or auto."
        raise UserError.of("device", device, "this machine has no usable CUDA device", remedy)
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


_planned_gpu_has_bf16: ContextVar[bool] = ContextVar("_planned_gpu_has_bf16", default=True)


@contextmanager
def planned_for(has_bf16: bool) -> Iterator[None]:
    """Within, models on `meta` are built as for a GPU with or without bf16."""
    token = _planned_gpu_has_bf16.set(has_bf16)
    try:
        yield
    finally:
        _planned_gpu_has_bf16.reset(token)


def compute_dtype(config: BaseConfig, device: torch.device) -> torch.dtype:
    """The dtype of every unquantized weight and of the arithmetic: bf16, or fp16 where CUDA lacks it.

    On `meta` it is that of the GPU in `planned_for`, by default one that has bf16.
    """
    import torch

    if config.bits == 32:
        return torch.float32
    if device.type == "meta":
        has_bf16 = _planned_gpu_has_bf16.get()
    else:
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16
