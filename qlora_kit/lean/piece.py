"""What a piece of the lean step says of what it did, and what pieces tell each other while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`done`: what was put on, in words ("" for nothing); `left`: what was left as it was, and why ("" for nothing).

    `made`: what whoever trains the model needs of the piece, such as the buffers of its factors; most need nothing.
    """

    done: str = ""
    left: str = ""
    made: Any = field(default=None, repr=False, compare=False)

    def said(self) -> dict[str, str]:
        """The words of it, ready for JSON."""
        return {"done": self.done, "left": self.left}


@contextmanager
def output_unread(layer: nn.Module) -> Iterator[None]:
    """While entered, nobody reads what `layer` gives: it runs for its graph only, and may leave its product out.

    Its output must still have its graph, shape and dtype.
    """
    layer._output_unread = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del layer._output_unread


def is_output_unread(layer: nn.Module) -> bool:
    """Whether `layer` runs for its graph only."""
    return "_output_unread" in vars(layer)
