"""Puts the pieces of the lean step on a model, and says what it did.

A piece is a file with one function `put_on(model, settings) -> Outcome`, and one line in `PIECES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_kit.config import LeanConfig
from qlora_kit.lean import mask
from qlora_kit.lean.outcome import Outcome


@dataclass(frozen=True)
class Piece:
    """A piece of the lean step: the setting that switches it, its name in the table, and what puts it on a model."""

    setting: str
    name: str
    put_on: Callable[[Any, LeanConfig], Outcome]


PIECES: tuple[Piece, ...] = (Piece("maskless_padding", "padding without a mask", mask.put_on),)


def make_lean(model: Any, settings: LeanConfig) -> dict[str, Outcome]:
    """Put every piece that `settings` asks for on `model` (base and factors); what each one did, by its name.

    `settings` must have no `auto` left (see `LeanConfig.resolved`). On batches with labels, which must be padded on
    the right as `data.Collator` pads, the model computes the loss and the gradients that it did before.
    """
    if settings.lean == "off":
        return {}
    return {piece.name: _put_on(piece, model, settings) for piece in PIECES}


def _put_on(piece: Piece, model: Any, settings: LeanConfig) -> Outcome:
    wanted = getattr(settings, piece.setting)
    assert wanted != "auto", "resolve the settings first"
    if wanted in (False, "off"):
        return Outcome(left="switched off")
    return piece.put_on(model, settings)
