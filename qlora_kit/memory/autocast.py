"""Autocast for tensors on `meta`, where torch has none: the casts it would make, and its cache of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qlora_kit.model import sdpa

_LOWER = frozenset(
    (
        functional.linear,
        functional.scaled_dot_product_attention,
        sdpa.attend,  # which casts before it chooses its kernel
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.matmul,
        torch.mm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.bmm,
    )
)
_FP32 = frozenset(
    (
        functional.cross_entropy,
        functional.layer_norm,
        functional.log_softmax,
        functional.nll_loss,
        functional.softmax,
        functional.softplus,
        torch.Tensor.__pow__,
        torch.Tensor.cumsum,
        torch.Tensor.exp,
        torch.Tensor.log,
        torch.Tensor.pow,
        torch.Tensor.prod,
        torch.Tensor.sum,
        torch.cumsum,
        torch.exp,
        torch.log,
        torch.pow,
        torch.rsqrt,
        torch.softmax,
        torch.sum,
    )
)


class MetaAutocast(TorchFunctionMode):
    """Casts the arguments of matrix products to `dtype` (bf16 or fp16) and those of norms, softmax and losses to fp32.

    A leaf that trains is cast once and the copy kept until the context ends, as `torch.autocast` does. The lists are
    those of torch's documentation ("Autocast op reference"), limited to what language models call. A block that is
    recomputed in the backward pass has a context of its own there: enter one with `caches` false around that pass.
    """

    def __init__(self, caches: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self._dtype = dtype
        self._caches = caches
        self._cache: dict[int, torch.Tensor] = {}

    def __exit__(self, *args: Any) -> None:
        """Leave the context and drop the cached copies."""
        self._cache.clear()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Cast the arguments of `func` where autocast would."""
        kwargs = kwargs or {}
        if func in _LOWER:
            cast = self._lowered
        elif func in _FP32:
            cast = _raised
        else:
            return func(*args, **kwargs)
        return func(*(cast(a) for a in args), **{k: cast(v) for k, v in kwargs.items()})

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (self._caches and value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._cache:
            self._cache[id(value)] = value.to(self._dtype)
        return self._cache[id(value)]


def _raised(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
