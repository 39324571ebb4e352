"""The names of labels: their order, how they are shown, and what each weighs in the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

SHOWN = 8  # labels named in a message


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Different names in the order of their numbers, where all are numbers, else of the alphabet."""
    different = set(names)
    if all(_is_number(name) for name in different):
        return tuple(sorted(different, key=lambda name: (float(name), name)))
    return tuple(sorted(different))


def _is_number(name: str) -> bool:
    try:
        return not math.isnan(float(name))  # which has no place among numbers
    except ValueError:
        return False


def shown(labels: Sequence[str]) -> str:
    """The first few labels in words."""
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def balanced_weights(counts: Sequence[int], total: int, several: bool) -> list[float]:
    """The weight of each label in the loss, the rarer the heavier, from how many of `total` examples have it.

    Of classes: total / (number of classes · count), so that the mean over the examples is 1 (scikit-learn's
    "balanced"). Where an example may have several: its absences over its presences, for the presences alone. A label
    that no example has keeps the weight 1.
    """
    if several:
        return [(total - count) / count if 0 < count < total else 1.0 for count in counts]
    present = sum(count > 0 for count in counts)
    return [total / (present * count) if count else 1.0 for count in counts]
