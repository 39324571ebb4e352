"""Layers that run for their graph only: nobody reads the output, so a layer that can leaves its product out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def output_unread(layer: nn.Module) -> Iterator[None]:
    """While entered, nobody reads what `layer` gives; its output must still have its graph, shape and dtype."""
    layer._output_unread = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del layer._output_unread


def is_output_unread(layer: nn.Module) -> bool:
    """Whether `layer` runs for its graph only."""
    return "_output_unread" in vars(layer)
