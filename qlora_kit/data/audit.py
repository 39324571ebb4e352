"""Counts what a user should know about a data set before training on it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.data.columns import Example


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A data set in numbers; lengths are in tokens, before anything is cut off.

    `unsupervised` counts the examples that were dropped because no token is supervised; `truncated`, `empty` (an answer
    of white space only) and `duplicates` (of an earlier example, word for word) are counted but kept. A pass over the
    kept examples reads `input_tokens` and learns `supervised_tokens`.
    """

    examples: int
    kept: int
    length_min: int
    length_median: float
    length_p95: int
    length_max: int
    truncated: int
    empty: int
    unsupervised: int
    duplicates: int
    input_tokens: int
    supervised_tokens: int


def audit(
    examples: Sequence[Example], lengths: Sequence[int], cut: Sequence[bool], supervised: Sequence[int], seq_len: int
) -> AuditReport:
    """The report on `examples`, given for each its length in tokens, whether it is cut, and its supervised tokens."""
    empty = sum(_is_empty(example) for example in examples)
    duplicates = len(examples) - len({_content(example) for example in examples})
    return audit_lengths(lengths, cut, supervised, seq_len, empty=empty, duplicates=duplicates)


def audit_lengths(
    lengths: Sequence[int],
    cut: Sequence[bool],
    supervised: Sequence[int],
    seq_len: int,
    *,
    empty: int,
    duplicates: int,
) -> AuditReport:
    """The report on examples of any kind; `empty` and `duplicates` are their counts."""
    assert lengths, "an empty data set is refused before its audit"
    in_order = sorted(lengths)
    kept = [index for index, count in enumerate(supervised) if count]
    return AuditReport(
        examples=len(lengths),
        kept=len(kept),
        length_min=in_order[0],
        length_median=statistics.median(in_order),
        length_p95=in_order[math.ceil(0.95 * len(in_order)) - 1],
        length_max=in_order[-1],
        truncated=sum(cut),
        empty=empty,
        unsupervised=len(lengths) - len(kept),
        duplicates=duplicates,
        input_tokens=sum(min(lengths[index], seq_len) for index in kept),
        supervised_tokens=sum(supervised),
    )


def _is_empty(example: Example) -> bool:
    if example.messages is None:
        return not example.completion.strip()
    return not any(message.content.strip() for message in example.messages if message.role == "assistant")


def _content(example: Example) -> tuple[object, ...]:
    return example.prompt, example.completion, example.messages
