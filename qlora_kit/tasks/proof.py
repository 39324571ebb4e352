"""What a release and the live model are both asked, as far as a task says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from qlora_kit.data.encode import IGNORED


@dataclass(frozen=True)
class ProofRow:
    """What a model is called with, and what is right for each row of the logits that come of it (−100: not known).

    The first of `labels` is never looked at: they have one place more than the logits have rows.
    """

    inputs: dict[str, list[int]]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class ProofTerms:
    """How the comparison of a release with the live model speaks of what was compared."""

    unit: str  # of which the logits of one row are
    each: str
    answers: str
    greedy: str  # what is likeliest
    same: str  # said where that is the same


WRITTEN = ProofTerms(
    unit="token",
    each="a token",
    answers="next tokens",
    greedy="the greedy answer",
    same="the greedy answer is the same text",
)


def chosen(unit: str, each: str, answers: str) -> ProofTerms:
    """The terms of a task that chooses among `answers` for each `unit`."""
    greedy = f"the list of likeliest {answers}"
    return ProofTerms(unit=unit, each=each, answers=answers, greedy=greedy, same=f"{greedy} is the same")


def whole_within(rows: Sequence[ProofRow], budget: int) -> list[ProofRow]:
    """The first rows that together have at most `budget` tokens, none of them cut; at least one."""
    totals = accumulate(max(map(len, row.inputs.values())) for row in rows)
    return list(rows[: sum(total <= budget for total in totals) or 1])


def is_learned(labels: Sequence[int]) -> bool:
    """Whether any of the labels of a row is known, but for the first, which is never looked at."""
    return any(label != IGNORED for label in labels[1:])
