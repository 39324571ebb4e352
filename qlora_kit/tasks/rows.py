"""Rows of tokens that a task makes and pads, and how two texts come into one row.

In the shapes: B rows, T positions, L labels. Padding is on the right, for models that read both ways and for those that
read a label off the last token alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

JOINT = "\n"  # between a pair, for a tokenizer that puts nothing there


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts anything between the two texts of a pair; those of most decoders do not."""
    both = tokenizer("a", "a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = [i for i in range(len(both)) if both[i : i + len(bare)] == bare]
    return len(starts) < 2 or starts[1] > starts[0] + len(bare)


class TokenRow(Protocol):
    """What `RowCollator` asks of a row."""

    @property
    def input_ids(self) -> list[int]:
        """Its tokens."""

    @property
    def token_type_ids(self) -> list[int] | None:
        """First or second text, for models that ask."""

    @property
    def label(self) -> int | Sequence[float] | None:
        """A number or several, 0 or 1 for each label, or None where it is to be found."""


class RowCollator:
    """Pads rows on the right to a common length, and masks the padding.

    Called with rows it returns `input_ids`, `attention_mask` (0 in the padding), `token_type_ids` where the tokenizer
    gives them, each int64 (B, T), and `labels` where the rows have some: int64 (B,), for tuples of numbers int64
    (B, 2), or with several to a row float32 (B, L). T is the longest row and no multiple of anything: short rows would
    be a good part padding, and no gain of it has been measured (docs/log.md).
    """

    def __init__(self, pad_token_id: int, pad_type_id: int = 0) -> None:
        self._pad_token_id, self._pad_type_id = pad_token_id, pad_type_id

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RowCollator:
        """The one that pads as `tokenizer` does."""
        return cls(tokenizer.pad_token_id, tokenizer.pad_token_type_id)

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """The batch of `rows`."""
        import torch

        length = max(len(row.input_ids) for row in rows)

        def padded(lists: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*own, *[value] * (length - len(own))] for own in lists], dtype=torch.int64)

        batch = {
            "input_ids": padded((row.input_ids for row in rows), self._pad_token_id),
            "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
        }
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if types:
            batch["token_type_ids"] = padded(types, self._pad_type_id)
        if rows[0].label is not None:
            dtype = torch.float32 if isinstance(rows[0].label, list) else torch.int64
            batch["labels"] = torch.tensor([row.label for row in rows], dtype=dtype)
        return batch


def model_inputs(row: TokenRow) -> dict[str, list[int]]:
    """What a model is called with for a row alone."""
    types = {} if row.token_type_ids is None else {"token_type_ids": row.token_type_ids}
    return {"input_ids": row.input_ids, **types}


def not_empty(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids`, or where a text and its tokenizer make none a token: the model must see something."""
    return ids or [tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
