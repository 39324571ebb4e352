"""torch's attention on a GPU: which kernel a call takes, and keys repeated where that avoids storing the scores.

Shapes: B rows, H heads, T positions, D features of a head; with grouped queries fewer heads have keys and values.

transformers gives grouped keys to torch as they are. Flash attention takes them so; up to torch 2.13 no other kernel
does that keeps no scores. So where flash attention cannot run (a GPU before Ampere, fp32) torch would make all of them,
(B, H, T, T). There the keys and values are repeated before the call, and the memory-efficient kernel takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_by_kernel"
FLASH, EFFICIENT, MATH = "flash", "efficient", "math"

FLASH_CAPABILITY = (8, 0)
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_WIDTH = 256
NARROW_CAPABILITIES = ((8, 6), (8, 9)), ((12, 0), (12, 1))
"""Ranges of capabilities in which flash attention has no backward pass for some wide heads."""

GROUPED_EFFICIENT_TORCH = (2, 14)
"""From this version of torch on, the memory-efficient kernel takes grouped keys."""

Capability = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """A call of torch's attention, as far as the choice of the kernel depends on it.

    `grouped`: fewer heads have keys than have queries. `square`: as many keys as queries, or not causal.
    """

    dtype: torch.dtype
    width: int
    value_width: int
    masked: bool = False
    grouped: bool = False
    square: bool = True
    dropout: float = 0.0
    trains: bool = True


def call_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, masked: bool, causal: bool, dropout: float
) -> AttentionCall:
    """The call with these tensors, (B, H, T, D) each."""
    return AttentionCall(
        dtype=query.dtype,
        width=query.shape[-1],
        value_width=value.shape[-1],
        masked=masked,
        grouped=query.shape[1] != key.shape[1],
        square=not causal or query.shape[2] == key.shape[2],
        dropout=dropout,
        trains=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)),
    )


def kernel_of(call: AttentionCall, capability: Capability) -> str:
    """The kernel that torch takes for `call` on a GPU of `capability`: `FLASH`, `EFFICIENT`, or `MATH` with its scores.

    Where cuDNN's attention comes first (Hopper), it takes the calls that flash attention would. Source: torch 2.8 to
    2.14, `ATen/native/transformers/cuda/sdp_utils.cpp`.
    """
    if _fits_flash(call, capability):
        return FLASH
    return EFFICIENT if _fits_efficient(call, capability) else MATH


def _fits_flash(call: AttentionCall, capability: Capability) -> bool:
    if capability < FLASH_CAPABILITY or call.dtype not in FLASH_DTYPES or call.masked or not call.square:
        return False
    return call.width == call.value_width <= FLASH_MAX_WIDTH and _has_flash_backward(call, capability)


def _has_flash_backward(call: AttentionCall, capability: Capability) -> bool:
    if not call.trains or not any(low <= capability <= high for low, high in NARROW_CAPABILITIES):
        return True
    return call.width <= 192 or (call.width > 224 and not call.dropout)


def _fits_efficient(call: AttentionCall, capability: Capability) -> bool:
    if call.grouped and _torch_version() < GROUPED_EFFICIENT_TORCH:
        return False
    if call.dtype == torch.bfloat16 and capability < FLASH_CAPABILITY:
        return False
    multiple = _width_multiple(call.dtype, capability)
    return call.width % multiple == 0 and call.value_width % multiple == 0


def _width_multiple(dtype: torch.dtype, capability: Capability) -> int:
    """The memory-efficient kernel needs head widths that are multiples of this."""
    if dtype in FLASH_DTYPES:
        return 8 if capability >= (7, 0) else 1
    return 4 if capability >= (8, 0) else 1


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def put_on(model: Any) -> None:
    """Let `model` attend by `attend` if it has grouped keys and leaves them to torch; other models stay as they are."""
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    if not any(_groups(module) > 1 for module in model.modules()):
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers, (B, T, H, D), as its sdpa gives it, by a kernel that keeps no scores."""
    tensors = query, key, value
    if has_torch_function(tensors):  # a plan knows another GPU, or none
        return handle_torch_function(attend, tensors, module, *tensors, attention_mask, **options)
    query, key, value = (_lowered(tensor) for tensor in tensors)
    return attend_on(capability_of(query.device), module, query, key, value, attention_mask, **options)


def attend_on(
    capability: Capability | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The same on a GPU of `capability`; if that is None, as transformers' sdpa does."""
    groups = _groups(module)
    # With a mask transformers repeats the keys itself.
    if capability is not None and groups > 1 and attention_mask is None:
        biased = options.get("position_bias") is not None
        dropout = options.get("dropout", 0.0)
        # What is causal is square by then: it cuts off keys that no query sees.
        call = call_of(query, key, value, masked=biased, causal=False, dropout=dropout)
        if kernel_of(call, capability) != FLASH:
            key, value = (_repeated(tensor, groups) for tensor in (key, value))
            module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def capability_of(device: torch.device) -> Capability | None:
    """The capability of an NVIDIA GPU; on `meta`, for plans, one with flash attention; None for other devices."""
    if device.type == "meta":
        return FLASH_CAPABILITY
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _groups(module: Any) -> int:
    """How many heads share their keys."""
    return getattr(module, "num_key_value_groups", None) or 1


def _repeated(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, H / groups, T, D) to (B, H, T, D): each head `groups` times."""
    batch, heads, positions, width = tensor.shape
    return tensor[:, :, None].expand(batch, heads, groups, positions, width).reshape(batch, -1, positions, width)


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that autocast gives it in the call: on it the kernel depends, and the size of what is repeated."""
    kind = tensor.device.type
    if kind != "cuda" or tensor.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
