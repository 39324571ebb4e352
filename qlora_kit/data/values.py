"""What a column may hold, whatever task it is read for."""

from __future__ import annotations

import math

HALF_A_PAIR = "holds half a surrogate pair, which is no text"


class BadValueError(ValueError):
    """A record does not fit its shape; says which rule it breaks."""


def is_missing(value: object) -> bool:
    """Whether `value` is nothing: null, or NaN, which pandas has where a value is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: object, what: str) -> str:
    """`value` as text; a number is taken as it is written. Raises `BadValueError` in the name of `what`."""
    if is_missing(value):
        raise BadValueError(f"{what} must be text, not {'null' if value is None else 'NaN'}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadValueError(f"{what} must be text, not {type(value).__name__}")
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
