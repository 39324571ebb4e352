"""What a piece of the lean step did to a model, and why not where it did not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """`done`: what was put on, in words ("" for nothing); `left`: what was left as it was, and why ("" for nothing)."""

    done: str = ""
    left: str = ""
