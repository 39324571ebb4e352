"""On a CPU, attention with dropout one row of the batch at a time.

    y[b] = dropout(softmax(q[b] k[b]ᵀ / √D + mask[b])) v[b]        for b = 0 … B − 1, one after the other

q, k, v: (B, H, T, D), for B rows, H heads, T positions and D features of a head; the scores of a row: (1, H, T, T).

Saves the scores: torch's attention for CPUs has no kernel with dropout, so it makes them for all rows at once, in fp32,
and keeps three tensors of (B, H, T, T) for the backward pass. Here only q, k and v are kept.
Exact: no row looks at another. In the backward pass each row is computed again with the same draw of the dropout, and
differentiated by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.lean.piece import Outcome
from qlora_kit.model import sdpa

NAME = "sdpa_by_row"
DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")  # how transformers' configs call it
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def put_on(model: Any) -> Outcome:
    """Let the attention of `model` work row by row where it has dropout and runs on a CPU."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = _reason_to_leave(base)
    if reason:
        return Outcome(left=reason)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    base.set_attn_implementation(NAME)
    return Outcome(done="attention row by row")


def _reason_to_leave(base: Any) -> str:
    if base.device.type == "cuda":
        return "kernels for GPUs keep no scores"
    if not any(getattr(base.config, name, None) for name in DROPOUTS):
        return "no dropout in attention"
    if base.config._attn_implementation not in ("sdpa", sdpa.NAME) or not base._supports_attention_backend:
        return f"{base.config._attn_implementation} attention"
    return ""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers, (B, T, H, D), as its sdpa gives it; without dropout, or of one row, that itself."""
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not dropout or query.shape[0] == 1 or options.get("position_bias") is not None:  # it may have rows, and train
        return stock(module, query, key, value, attention_mask, dropout=dropout, **options)  # type: ignore[no-any-return]

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return stock(module, q, k, v, mask, dropout=dropout, **options)[0]  # type: ignore[no-any-return]

    return ByRow.apply(one, query, key, value, attention_mask), None  # type: ignore[no-untyped-call]


class ByRow(torch.autograd.Function):
    """An attention applied to each row, (1, H, T, D), that keeps only what it is given."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`attention` of every row, (B, T, H, D); `mask` is (B or 1, 1 or H, T, T), or None."""
        ctx.attention, ctx.random_state = attention, torch.get_rng_state()
        ctx.save_for_backward(query, key, value, mask)
        return torch.cat([attention(*row) for row in _rows(query, key, value, mask)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of query, key and value."""
        *kept, mask = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in kept]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            for number, (*row, row_mask) in enumerate(_rows(*kept, mask)):
                leaves = [tensor.detach().requires_grad_() for tensor in row]
                out = ctx.attention(*leaves, row_mask)
                of_row = torch.autograd.grad(out, leaves, grad_BTHD[number : number + 1])
                del out
                for grad, own in zip(grads, of_row, strict=True):
                    grad[number : number + 1] = own
        return None, *grads, None


def _rows(*tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each row of the tensors; of those with one row, that one each time, and None for None."""
    assert tensors[0] is not None, "the query"
    for number in range(tensors[0].shape[0]):
        yield tuple(t if t is None or t.shape[0] == 1 else t[number : number + 1] for t in tensors)
