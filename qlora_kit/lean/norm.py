"""RMS norms that keep their input as it is for the backward pass, and not a copy of it in fp32.

    s = 1 / √(mean(x²) + ε),    n = s · x,    y = w · n
    ∂x = s · (w ∂y − n · mean(w ∂y · n))

x, y: (N, D), for N rows (each normed by itself) and D features; w: (D,), frozen (1 + weight in Gemma).

Saves the fp32 copy of x, N · D · 4 bytes for each norm; the temporaries in fp32 are there for some rows at a time.
Exact: the forward pass is transformers' own, and the backward pass is the line above in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qlora_kit.lean.piece import Outcome

CHUNK_BYTES = 16 << 20
"""The fp32 temporaries of so many rows at a time, each of this size."""

SCALED_BY_WEIGHT = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
SCALED_BY_ONE_PLUS_WEIGHT = ("GemmaRMSNorm", "Gemma2RMSNorm")


def put_on(model: Any) -> Outcome:
    """Let each RMS norm of `model` whose formula is known here keep its input only."""
    known = (*SCALED_BY_WEIGHT, *SCALED_BY_ONE_PLUS_WEIGHT)
    rms_norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    lean = [norm for norm in rms_norms if type(norm).__name__ in known and _is_transformers(norm)]
    classes = {kind: type(f"Lean{kind.__name__}", (_LeanNorm, kind), {}) for kind in {type(norm) for norm in lean}}
    for norm in lean:
        norm.__class__ = classes[type(norm)]
    others = sorted({type(norm).__name__ for norm in rms_norms if norm not in lean})
    done = f"{len(lean)} norms" if lean else ""
    if not rms_norms:
        return Outcome(left="no RMS norms in this model")
    return Outcome(done=done, left=f"{', '.join(others)}: of another formula" if others else "")


def _is_transformers(norm: nn.Module) -> bool:
    return type(norm).__module__.startswith("transformers.models.")


class _LeanNorm(nn.Module):
    """Before the class of a norm: runs it as that class does, and keeps only its input."""

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of `x`, (…, D)."""
        stock: Callable[[torch.Tensor], torch.Tensor] = super().forward
        if not torch.is_grad_enabled() or not x.requires_grad or self.weight.requires_grad:
            return stock(x)
        return _RmsNorm.apply(x, self, stock)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """A norm with a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: _LeanNorm, stock: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The norm of `x`, (…, D); `stock` is what transformers computes."""
        ctx.norm = norm
        ctx.save_for_backward(x)
        y: torch.Tensor | None = None
        for rows, x_ND in _chunks(x):
            part_ND = stock(x_ND)
            if y is None:
                y = torch.empty(x.shape, dtype=part_ND.dtype, device=x.device)
            y.view(-1, x.shape[-1])[rows] = part_ND
        assert y is not None, "there is a row"
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of x, in its dtype."""
        (x,) = ctx.saved_tensors
        eps, scale_D = _eps_and_scale(ctx.norm)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_x_ND, grad_y_ND = grad_x.view(-1, x.shape[-1]), grad_y.reshape(-1, x.shape[-1])
        for rows, x_ND in _chunks(x):
            normed_ND = x_ND.float()
            inverse_N1 = torch.rsqrt(normed_ND.pow(2).mean(-1, keepdim=True) + eps)
            normed_ND = normed_ND * inverse_N1
            scaled_ND = grad_y_ND[rows] * scale_D
            mean_N1 = (scaled_ND * normed_ND).mean(-1, keepdim=True)
            grad_x_ND[rows] = scaled_ND.addcmul_(normed_ND, mean_N1, value=-1).mul_(inverse_N1)
        return grad_x, None, None


def _eps_and_scale(norm: Any) -> tuple[float, torch.Tensor]:
    """ε, and what the normed features are multiplied with, (D,) in fp32."""
    weight_D = norm.weight.float()
    if hasattr(norm, "variance_epsilon"):
        return norm.variance_epsilon, weight_D
    return norm.eps, 1 + weight_D


def _chunks(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows, and these rows of `x`."""
    x_ND = x.reshape(-1, x.shape[-1])
    n_rows = max(CHUNK_BYTES // (4 * x.shape[-1]), 1)
    for start in range(0, x_ND.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        yield rows, x_ND[rows]
