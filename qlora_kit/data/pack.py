"""Puts several examples into one row, whole, so that little of a row is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from qlora_kit.data.encode import Encoded, EncodedSet


@dataclass(frozen=True)
class PackedSet:
    """Rows of several examples; a map-style data set of `{"input_ids", "labels", "segment_lengths"}` (lists)."""

    rows: list[list[Encoded]]
    seq_len: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {
            "input_ids": [token for example in row for token in example.input_ids],
            "labels": [label for example in row for label in example.labels],
            "segment_lengths": [len(example.input_ids) for example in row],
        }

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest example."""
        return max(len(example.input_ids) for row in self.rows for example in row)

    @property
    def fill(self) -> float:
        """The share of the rows' `seq_len` positions that holds tokens."""
        tokens = sum(len(example.input_ids) for row in self.rows for example in row)
        return tokens / (len(self.rows) * self.seq_len)


def pack(encoded: EncodedSet, seq_len: int) -> PackedSet:
    """The examples of `encoded` in rows of at most `seq_len` tokens, no example split: best fit, longest first.

    The same examples always give the same rows. In each example the first label is -100, so no row teaches to
    predict an example from the one before it. `encoded` must have been made with this `seq_len` or a smaller one.
    """
    assert all(len(row.input_ids) <= seq_len for row in encoded.rows), "an example is longer than a row"
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(encoded.rows, key=lambda row: len(row.input_ids), reverse=True):
        needed = len(example.input_ids)
        best = bisect_left(room, (needed, 0))
        if best < len(room):
            free, row = room.pop(best)
        else:
            free, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(room, (free - needed, row))
    return PackedSet(rows, seq_len)
