"""Packed rows attended example by example: no mask over the row, and no product between one example and another.

    y[a:e] = softmax(q[a:e] k[a:e]ᵀ / √D + causal) v[a:e]        for each segment from a to e

q, k, v, y: (B, H, T, D), for B rows, H heads, T positions and D features of a head. A segment is an example, or the
padding at the end of a row.

Saves the block-diagonal mask, (B, 1, T, T), and the products that it would set to nothing.
Exact: what the mask leaves of a row's scores are those within its segments.

The batch says where the segments are (`data.Collator` with `varlen`):

    segment_lengths   the tokens of each segment, row after row; numbers, so that nobody waits for the device
    segment_starts    (segments + 1,) int32, where each begins among all B·T positions, and the end

transformers hands what it does not know down to the attention function, through checkpoints as well. Instead of a mask
the batch has an empty one, (B, 1, 0, 0): transformers takes a mask of four dimensions as it is, and an attention that
does not know of segments fails on it, where it would look across examples without any.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.lean import attention
from qlora_kit.lean.mask import NOT_CAUSAL
from qlora_kit.lean.piece import Outcome
from qlora_kit.model import sdpa

NAMES = {
    "sdpa": "sdpa_by_example",
    **{name: f"{name}_or_example" for name in (attention.NAME, sdpa.NAME)},
}
"""The attention of packed rows, by that of other batches; with "flash" in it transformers would ask the hub."""

KNOWN_WINDOWS = ("mistral", "qwen2", "qwen3")
"""Models that give a sliding window to the attention function, and not only to the mask."""

CHANGES_SCORES = ("is_causal", "position_bias", "softcap")  # what transformers' sdpa takes, or refuses aloud
aten = torch.ops.aten


def put_on(model: Any) -> Outcome:
    """Let the attention of `model` take packed rows example by example; other batches are attended as before."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = _reason_to_leave(base)
    if reason:
        return Outcome(left=f"packed rows get a mask: {reason}")
    otherwise = base.config._attn_implementation
    name = NAMES[otherwise]
    AttentionInterface.register(name, functools.partial(attend, otherwise))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    base.set_attn_implementation(name)
    return Outcome(done="packed rows attend example by example")


def is_on(model_config: Any) -> bool:
    """Whether a model with this (transformers) config takes packed rows example by example."""
    return getattr(model_config, "_attn_implementation", None) in NAMES.values()


def _reason_to_leave(base: Any) -> str:
    config = base.config
    if base.get_output_embeddings() is None:
        return "there is no head over the vocabulary"
    if config._attn_implementation not in NAMES or not base._supports_attention_backend:
        return f"{config._attn_implementation} attention"
    if any(getattr(config, name, None) for name in NOT_CAUSAL) or not getattr(config, "is_causal", True):
        return "attention is not causal everywhere"
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return "layers of other kinds"
    if getattr(config, "sliding_window", None) and config.model_type not in KNOWN_WINDOWS:
        return "a sliding window that is not known here"
    return ""


def attend(
    otherwise: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_lengths: Sequence[int] | None = None,
    segment_starts: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of packed rows, (B, T, H, D), for transformers; without segments by the attention `otherwise`."""
    if segment_lengths is None:
        return ALL_ATTENTION_FUNCTIONS[otherwise](module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    assert segment_starts is not None, "the collator gives both"
    plain = all(options.get(name) is None for name in CHANGES_SCORES)
    way = attend_at_once if plain and _is_for_flash(query, value, options.get("dropout", 0.0)) else attend_one_by_one
    return way(module, query, key, value, segment_lengths, segment_starts, **options), None


def _is_for_flash(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether flash attention takes these tensors; on `meta`, where runs are planned, as a GPU that has it would."""
    capability = sdpa.capability_of(query.device)
    if capability is None or query.shape[-1] % 8:
        return False
    call = sdpa.call_of(query, value, value, masked=False, causal=True, dropout=dropout)
    return sdpa.kernel_of(call, capability) == sdpa.FLASH


def attend_at_once(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    starts: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """All segments in one call of flash attention's kernel for variable lengths; (B, T, H, D)."""
    arguments = (module, query, key, value, lengths, starts, dropout, scaling, sliding_window)
    if has_torch_function((query, key, value)):  # a plan may know that its GPU has no such kernel
        return handle_torch_function(attend_at_once, (query, key, value), *arguments)
    longest = max(2, *lengths)  # at 1 the kernel takes another way, that of generation, for which rows are not laid out
    window = -1 if sliding_window is None else sliding_window - 1
    out_NHD = aten._flash_attention_forward(
        *(_positions_first(tensor) for tensor in (query, key, value)),
        starts,
        starts,
        longest,
        longest,
        dropout,
        True,
        False,
        scale=scaling,
        window_size_left=window,
        window_size_right=-1,
    )[0]
    return out_NHD.view(query.shape[0], query.shape[2], *out_NHD.shape[1:])  # type: ignore[no-any-return]


def _positions_first(tensor_BHTD: torch.Tensor) -> torch.Tensor:
    """(B · T, H, D); a copy only where the heads do not lie together for each position."""
    return tensor_BHTD.transpose(1, 2).flatten(0, 1)


def attend_one_by_one(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    starts: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Each segment by transformers' sdpa; (B, T, H, D)."""
    parts = []
    for row, start, length in _places(lengths, query.shape[2]):
        q, k, v = (tensor[row : row + 1, :, start : start + length] for tensor in (query, key, value))
        mask = _window_mask(length, sliding_window, query.device)
        out, _ = sdpa.attend(module, q, k, v, mask, dropout=dropout, scaling=scaling, **options)
        parts.append(out[0])
    return torch.cat(parts).view(query.shape[0], query.shape[2], *parts[0].shape[1:])


def _places(lengths: Sequence[int], row_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Row, first position in it, and length of each segment; none reaches over the end of a row."""
    begin = 0
    for length in lengths:
        yield begin // row_tokens, begin % row_tokens, length
        begin += length


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(1, 1, length, length), open to the `window` last positions; None where that is all of them."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)[None, None]
