"""The loss without the logits: the head and the cross-entropy for a few supervised rows at a time.

    z_n  = cap(scale · (W h_n + b))                                   for C of the N supervised rows at a time
    loss = Σ_n (logsumexp(z_n) − z_n[target_n]) / n_items
    ∂h_n = Wᵀ (scale · cap′ · (softmax(z_n) − onehot(target_n))) / n_items

h: (M, D) hidden states, of which N rows are supervised; W: (V, D), frozen; z: (C, V); for B rows of T positions,
M = B·T, D hidden size, V vocabulary.

Saves the logits, (M, V) in 16 bits and in fp32, with their gradient: C · V numbers are there at a time.
Exact: rows do not depend on each other, and rows that are not supervised add nothing to the loss. The head is frozen,
so ∂h is all that the backward pass needs; it is computed with the loss, while the logits of its rows are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_kit.data.encode import IGNORED
from qlora_kit.lean.heads import Head, decoder_of, head_of, why_not
from qlora_kit.lean.piece import Outcome

MAX_ROWS = 256  # with fewer, a GPU waits for the head's weight: it is read once for all of them
MAX_FP32_BYTES = 128 * 2**20  # of the logits of one chunk; two such buffers live at once


def put_on(model: Any) -> Outcome:
    """Let the causal language model in the PEFT `model` compute its loss in chunks; without labels it gives logits."""
    causal = model.get_base_model()
    reason = why_not(causal)
    if reason:
        return Outcome(left=f"the stock loss: {reason}")
    causal.chunked_loss = ChunkedLoss()
    causal.forward = MethodType(_with_chunked_loss(type(causal).forward), causal)
    n_vocab = causal.get_output_embeddings().weight.shape[0]
    return Outcome(done=f"logits of {chunk_rows(n_vocab)} supervised tokens at a time")


def chunk_rows(n_vocab: int) -> int:
    """How many rows go through the head at once: a multiple of 64, fewer for a large vocabulary."""
    fitting = MAX_FP32_BYTES // (4 * n_vocab)
    return min(MAX_ROWS, max(64, fitting // 64 * 64))


class ChunkedLoss(nn.Module):
    """The loss of a batch; a module without weights, so that hooks can tell where the loss begins."""

    def forward(
        self, hidden_BTD: torch.Tensor, rows_N: torch.Tensor, targets_N: torch.Tensor, head: Head, n_items: Any
    ) -> torch.Tensor:
        """See `linear_cross_entropy`."""
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), targets_N, head, n_items, rows_N)


def linear_cross_entropy(
    hidden_MD: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    n_items: torch.Tensor | float = 1,
    rows_N: torch.Tensor | None = None,
    rows_at_once: int | None = None,
) -> torch.Tensor:
    """The summed cross-entropy of the rows `rows_N` (all by default) of `hidden_MD`, over `n_items`: an fp32 scalar.

    The product is in the dtype of `hidden_MD` (or autocast's), all that follows in fp32. No more than `rows_at_once`
    rows of logits live at any time (by default `chunk_rows`); beside them the gradient of N rows, where one is needed.
    """
    assert not head.weight.requires_grad, "the head is frozen"
    if rows_N is None:
        rows_N = torch.arange(hidden_MD.shape[0], device=hidden_MD.device)
    if not torch.is_tensor(n_items):
        n_items = hidden_MD.new_full((), n_items, dtype=torch.float32)
    n_items = n_items.to(hidden_MD.device, torch.float32)
    chunks = _chunks(rows_N.shape[0], rows_at_once or chunk_rows(head.weight.shape[0]))
    if torch.is_grad_enabled() and hidden_MD.requires_grad:
        arguments = (hidden_MD, rows_N, targets_N, head, n_items, chunks)
        return _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]
    loss = hidden_MD.new_zeros((), dtype=torch.float32)
    for chunk in chunks:
        loss += _loss(hidden_MD.index_select(0, rows_N[chunk]), targets_N[chunk], head)
    return loss / n_items


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the hidden state, scaled by the mantissa of 1 / n_items.

    The power of two that is left comes in with the gradient of the loss, and multiplies exactly. So the gradient is
    rounded as often as the stock loss rounds it, and yet kept in a range where fp16 does not underflow before its
    scaler's factor arrives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        rows_N: torch.Tensor,
        targets_N: torch.Tensor,
        head: Head,
        n_items: torch.Tensor,
        chunks: list[slice],
    ) -> torch.Tensor:
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        gradient_ND = hidden_MD.new_empty(rows_N.shape[0], hidden_MD.shape[1])
        share = n_items.reciprocal()
        mantissa = torch.frexp(share).mantissa
        for chunk in chunks:
            hidden_CD = hidden_MD.index_select(0, rows_N[chunk])
            chunk_loss, gradient_ND[chunk] = _loss_and_gradient(hidden_CD, targets_N[chunk], head, mantissa)
            loss += chunk_loss
        ctx.save_for_backward(rows_N, gradient_ND, share / mantissa)
        ctx.n_rows = hidden_MD.shape[0]
        return loss / n_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> Any:
        rows_N, gradient_ND, power_of_two = ctx.saved_tensors
        gradient_MD = gradient_ND.new_zeros(ctx.n_rows, gradient_ND.shape[1])
        factor = loss_gradient * power_of_two
        for chunk in _chunks(rows_N.shape[0], MAX_ROWS):  # in fp32: CUDA would first round the factor to 16 bits
            gradient_CD = gradient_ND[chunk].float().mul_(factor)
            gradient_MD.index_copy_(0, rows_N[chunk], gradient_CD.to(gradient_MD.dtype))
        return gradient_MD, None, None, None, None, None


def _chunks(n_rows: int, at_most: int) -> list[slice]:
    """Cut `n_rows` into chunks of `at_most` rows, the last one of what is left.

    Of even lengths, 257 rows would have chunks of 129 and need less than 256 do, and the plan of a batch, in which all
    tokens are supervised, would be too small for one in which fewer are.
    """
    return [slice(start, min(start + at_most, n_rows)) for start in range(0, n_rows, at_most)]


def _logits(hidden_CD: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.dtype]:
    """The logits (C, V) in fp32, and the dtype of the head's product."""
    logits_CV = functional.linear(hidden_CD, head.weight, head.bias)
    dtype = logits_CV.dtype
    logits_CV = logits_CV.float()  # the product dies here
    if head.scale != 1.0:
        logits_CV.mul_(head.scale)
    if head.soft_cap is not None:
        logits_CV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return logits_CV, dtype


def _loss(hidden_CD: torch.Tensor, targets_C: torch.Tensor, head: Head) -> torch.Tensor:
    """The summed loss of a chunk. Two fp32 buffers (C, V) live at once."""
    logits_CV, _ = _logits(hidden_CD, head)
    return functional.cross_entropy(logits_CV, targets_C, reduction="sum")


def _loss_and_gradient(
    hidden_CD: torch.Tensor, targets_C: torch.Tensor, head: Head, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a chunk, and its gradient for `hidden_CD` times `factor`.

    Two fp32 buffers (C, V) live at once.
    """
    logits_CV, dtype = _logits(hidden_CD, head)
    gradient_CV = functional.log_softmax(logits_CV, dim=-1)
    targets_C1 = targets_C.unsqueeze(1)
    loss = -gradient_CV.gather(1, targets_C1).sum()
    gradient_CV.exp_().mul_(factor)
    gradient_CV.scatter_(1, targets_C1, gradient_CV.gather(1, targets_C1) - factor)
    if head.soft_cap is not None:
        gradient_CV.mul_(logits_CV.div_(head.soft_cap).square_().neg_().add_(1))  # tanh' = 1 - tanh²
    del logits_CV
    if head.scale != 1.0:
        gradient_CV.mul_(head.scale)
    gradient_CV = gradient_CV.to(dtype)
    return loss, gradient_CV @ head.weight


def find_supervised(targets_BT: torch.Tensor, n_positions: int, ignored: int = IGNORED) -> tuple[torch.Tensor, ...]:
    """The rows of the hidden state that have a target, and their targets; (N,) both, ascending.

    `targets_BT[b, t]` belongs to row `b * n_positions + t`. Waits for the device (`nonzero`).
    """
    places_N2 = (targets_BT != ignored).nonzero()
    batch_N, position_N = places_N2.unbind(1)
    return batch_N * n_positions + position_N, targets_BT[batch_N, position_N]


def _with_chunked_loss(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a causal language model, with the chunked loss where only the loss is asked for.

    It keeps the signature: generation and the Trainer look at it.
    """

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return stock(self, *args, **kwargs)
        if args or _needs_logits(self, kwargs):
            return stock(self, *args, labels=labels, **kwargs)
        return _loss_only(self, labels, kwargs)

    return forward


def _needs_logits(causal: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call says which logits it wants, or wants a tuple, in which they have a place."""
    as_tuple = (causal.config.return_dict if kwargs.get("return_dict") is None else kwargs["return_dict"]) is False
    return as_tuple or "logits_to_keep" in kwargs


def _loss_only(causal: Any, labels_BT: torch.Tensor, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
    """Run the decoder and the loss, as the stock `forward` does but for the logits."""
    head = head_of(causal)
    shifted_BT = kwargs.get("shift_labels")
    targets_BT = labels_BT[:, 1:] if shifted_BT is None else shifted_BT  # row t predicts label t + 1
    n_positions, ignored = labels_BT.shape[1], kwargs.get("ignore_index", IGNORED)
    # before the decoder: this waits for the device, which has little to do yet
    rows_N, targets_N = find_supervised(targets_BT.to(head.weight.device), n_positions, ignored)
    outputs = decoder_of(causal)(**{name: value for name, value in kwargs.items() if name != "return_dict"})
    if outputs.last_hidden_state.shape[:2] != labels_BT.shape:
        raise ValueError(f"labels {tuple(labels_BT.shape)} for {tuple(outputs.last_hidden_state.shape[:2])} positions")
    n_items = kwargs.get("num_items_in_batch")
    n_items = rows_N.shape[0] if n_items is None else n_items
    return CausalLMOutputWithPast(
        loss=causal.chunked_loss(outputs.last_hidden_state, rows_N, targets_N, head, n_items),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
