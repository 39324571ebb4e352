"""Puts the pieces of the lean step on a model, and says what it did.

A piece is a file with one function `put_on(model) -> Outcome`, and one line in `PIECES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.settings import LeanConfig
from qlora_kit.lean import attention, embedding, flat, gelu, half_blocks, linear, loss, mask, mlp, norm, offload, varlen
from qlora_kit.lean.piece import Outcome


@dataclass(frozen=True)
class Piece:
    """A piece of the lean step: the setting that switches it, its name in the table, and what puts it on a model."""

    setting: str
    name: str
    put_on: Callable[[Any], Outcome]


PIECES: tuple[Piece, ...] = (
    Piece("lora_first", "factors first", linear.put_on),
    Piece("tanh_gelu", "gelu in one operation", gelu.put_on),
    Piece("rms_norm", "norms that keep their input", norm.put_on),
    Piece("tiled_mlp", "MLP in tiles", mlp.put_on),
    Piece("offload_activations", "checkpoints on the host", offload.put_on),
    Piece("half_blocks", "half-block checkpoints", half_blocks.put_on),
    Piece("offload_embedding", "embedding on the host", embedding.put_on),
    Piece("chunked_loss", "loss in chunks", loss.put_on),
    Piece("maskless_padding", "padding without a mask", mask.put_on),
    Piece("attention_by_row", "attention row by row", attention.put_on),
    Piece("varlen", "packed rows by example", varlen.put_on),
    Piece("flat_buffer", "one buffer of factors", flat.put_on),  # last: it lays out what the others leave
)


def loads_embedding_on_host(settings: LeanConfig) -> bool:
    """Whether a model whose pieces `settings` choose is to be loaded with its input embedding on the host.

    Moved there later, it would have been on the device together with all the rest.
    """
    is_piece = any(piece.setting == "offload_embedding" for piece in PIECES)
    return is_piece and settings.lean == "on" and settings.offload_embedding == "on"


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
    return piece.put_on(model)
