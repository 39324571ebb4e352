"""Checks of column values that all tasks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.data.problems import Problems

NOTHING = ("", "[]", "{}", "null")  # texts, also those of JSON in a column
HALF_A_PAIR = "has half a surrogate pair, which is not text"


class BadValueError(ValueError):
    """A record does not fit its shape; the message is the rule that it breaks."""

    def add_to(self, problems: Problems, origin: str) -> None:
        """Note it of the record at `origin`."""
        problems.add(origin, str(self))


def is_missing(value: object) -> bool:
    """Whether `value` is nothing: null, or NaN, which pandas has where a value is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: object) -> bool:
    """Whether `value` is empty: missing, a blank text, or a list or an object of empty values."""
    if isinstance(value, str):
        return value.strip() in NOTHING
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return all(map(is_empty, value)) if isinstance(value, list) else is_missing(value)


def named_kind(value: object) -> str:
    """The kind of `value`, for a message that says what it should be instead."""
    if is_missing(value):
        return "null" if value is None else "NaN"
    return "an object" if isinstance(value, Mapping) else type(value).__name__


def as_text(value: object, what: str) -> str:
    """`value` as text; a number becomes its text. Raises `BadValueError`, whose message begins with `what`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    if not isinstance(value, str):
        raise BadValueError(f"{what} must be text, not {named_kind(value)}")
    if not is_whole(value):
        raise BadValueError(f"{what} {HALF_A_PAIR}")
    return value


def is_whole(text: str) -> bool:
    """Whether `text` is without half a surrogate pair, so that it can be written and tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
