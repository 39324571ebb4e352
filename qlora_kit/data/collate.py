"""Makes a batch of tensors. In the shapes, B is rows, T positions; padding is on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError, named

if TYPE_CHECKING:
    import torch

Feature = Mapping[str, Sequence[int]]


class Collator:
    """Pads rows to a common length and masks the padding by its position, whatever token it is made of.

    Called with features of `{"input_ids", "labels"}` it returns `input_ids`, `labels` (-100 in the padding) and
    `attention_mask` (0 in the padding), each int64 of shape (B, T).

    With `packed` the features also have `segment_lengths`. Then `position_ids` (B, T) restart at 0 with each
    example, and `attention_mask` is (B, 1, T, T): causal within an example, shut between examples. In
    `mask_dtype` bool, the default, it is true where attention is open (for sdpa); in a floating dtype it is added to
    the scores (for eager attention, which would take a bool for 0 and 1). Padding attends to itself, so no row of
    scores is empty and none gives NaN.

    With `varlen` besides, for a model that attends example by example (`lean.varlen`), there is no mask over the row:
    `attention_mask` is an empty one, (B, 1, 0, 0) bool, `segment_lengths` lists the tokens of each example row after
    row, the padding of a row as one more, and `segment_starts` (int32) says where each begins among all B·T positions,
    and where the last one ends.

    T is the longest row, rounded up to `pad_to_multiple_of` but never above `max_tokens` (the model's positions).
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | None = 8,
        packed: bool = False,
        *,
        max_tokens: int | None = None,
        mask_dtype: torch.dtype | None = None,
        varlen: bool = False,
    ) -> None:
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of
        self._packed = packed
        self._max_tokens = max_tokens
        self._mask_dtype = mask_dtype
        self._varlen = varlen

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """The batch of `features`; see the class for its tensors and their shapes."""
        length = self._padded_length(max(len(feature["input_ids"]) for feature in features))
        batch: dict[str, Any] = {
            "input_ids": _padded([feature["input_ids"] for feature in features], length, self._pad_token_id),
            "labels": _padded([feature["labels"] for feature in features], length, IGNORED),
        }
        if self._packed:
            segments, positions = _segments_and_positions([f["segment_lengths"] for f in features], length)
            batch["position_ids"] = positions
            if self._varlen:
                batch.update(segment_tensors([f["segment_lengths"] for f in features], length))
            else:
                batch["attention_mask"] = _block_causal_mask(segments, self._mask_dtype)
        else:
            ones = [[1] * len(feature["input_ids"]) for feature in features]
            batch["attention_mask"] = _padded(ones, length, 0)
        return batch

    def _padded_length(self, longest: int) -> int:
        multiple = self._pad_to_multiple_of or 1
        rounded = -(-longest // multiple) * multiple
        return rounded if self._max_tokens is None else max(longest, min(rounded, self._max_tokens))


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    import torch

    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)


def _segments_and_positions(lengths_by_row: Sequence[Sequence[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each position its example's number and its place in it, (B, T); padding counts as one more example."""
    import torch

    segments, positions = [], []
    for lengths in lengths_by_row:
        with_padding = [*lengths, length - sum(lengths)]
        segments.append([number for number, tokens in enumerate(with_padding) for _ in range(tokens)])
        positions.append([place for tokens in with_padding for place in range(tokens)])
    return torch.tensor(segments, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)


def segment_tensors(lengths_by_row: Sequence[Sequence[int]], length: int) -> dict[str, Any]:
    """The places of the examples in packed rows of `length` positions, for a model; see `Collator`."""
    import torch

    padding = [length - sum(lengths) for lengths in lengths_by_row]
    segments = [n for lengths, rest in zip(lengths_by_row, padding, strict=True) for n in (*lengths, rest) if n]
    starts = torch.tensor([0, *accumulate(segments)], dtype=torch.int32)
    mask = torch.empty((len(lengths_by_row), 1, 0, 0), dtype=torch.bool)
    return {"attention_mask": mask, "segment_lengths": segments, "segment_starts": starts}


def _block_causal_mask(segments_BT: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """(B, 1, T, T): open from a query to the keys of its own example that do not come after it."""
    import torch

    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    is_open = (segments_BT[:, None, :, None] == segments_BT[:, None, None, :]) & causal_TT
    if dtype is None or dtype == torch.bool:
        return is_open
    return torch.zeros(is_open.shape, dtype=dtype).masked_fill(~is_open, torch.finfo(dtype).min)


def packed_mask_dtype(model_config: Any, longest_tokens: int) -> torch.dtype:
    """The collator's `mask_dtype` for a model with this transformers config: bool for sdpa, float32 for eager.

    A model that attends example by example needs no mask (`varlen` of `Collator`). Raises `UserError` for `pack` if
    the model's attention cannot take the mask: another implementation, or a sliding window shorter than the longest
    example, which the mask would switch off.
    """
    import torch

    implementation = str(getattr(model_config, "_attn_implementation", None)).split("_by_")[0]  # ours are sdpa's
    window = getattr(model_config, "sliding_window", None)
    if implementation not in ("sdpa", "eager"):
        raise UserError.of("pack", True, f"does not work with {implementation} attention", f"Drop {named('pack')}.")
    if window is not None and longest_tokens > window:
        rule = f"does not work with examples of {longest_tokens} tokens: the model's attention window has {window}"
        raise UserError.of("pack", True, rule, f"Drop {named('pack')}, or give {named('seq_len', window)}.")
    return torch.bool if implementation == "sdpa" else torch.float32
