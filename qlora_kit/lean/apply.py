"""Puts the pieces of the lean step on a model, and says what it did.

A piece is a file in this folder with one function `put_on(model) -> Outcome`, and one line in `PIECES`. With no more
than that it is on wherever `--lean` is. One that shall be switched by itself also has a field in `LeanConfig`, named in
its line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.settings import LeanConfig
from qlora_kit.lean.piece import Outcome


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of the lean step: its name in the table, its file, and the setting that switches it.

    Without a `setting` it is on with the whole. One that `parts_rates` is also told the ratio of LoRA+, by which
    factors have learning rates of their own. Instead of a file it may be the function itself.
    """

    name: str
    put_on: str | Callable[..., Outcome]
    setting: str | None = None
    parts_rates: bool = False


PIECES: tuple[Piece, ...] = (
    Piece(name="factors first", put_on="linear", setting="lora_first"),
    Piece(name="gelu in one operation", put_on="gelu", setting="tanh_gelu"),
    Piece(name="norms that keep their input", put_on="norm", setting="rms_norm"),
    Piece(name="MLP in tiles", put_on="mlp", setting="tiled_mlp"),
    Piece(name="checkpoints on the host", put_on="offload", setting="offload_activations"),
    Piece(name="half-block checkpoints", put_on="half_blocks", setting="half_blocks"),
    Piece(name="embedding on the host", put_on="embedding", setting="offload_embedding"),
    Piece(name="loss in chunks", put_on="loss", setting="chunked_loss"),
    Piece(name="padding without a mask", put_on="mask", setting="maskless_padding"),
    Piece(name="attention row by row", put_on="attention", setting="attention_by_row"),
    Piece(name="packed rows by example", put_on="varlen", setting="varlen"),
    # the last, for it lays out what the others leave: a new piece goes above it
    Piece(name="one buffer of factors", put_on="flat", setting="flat_buffer", parts_rates=True),
)


def loads_embedding_on_host(settings: LeanConfig) -> bool:
    """Whether a model whose pieces `settings` choose is to be loaded with its input embedding on the host.

    Moved there later, it would have been on the device together with all the rest.
    """
    is_piece = any(piece.setting == "offload_embedding" for piece in PIECES)
    return is_piece and settings.lean == "on" and settings.offload_embedding == "on"


def make_lean(model: Any, settings: LeanConfig, lora_plus: float | None = None) -> dict[str, Outcome]:
    """Put every piece that `settings` asks for on `model` (base and factors); what each one did, by its name.

    `settings` must have no `auto` left (see `LeanConfig.resolved`). `lora_plus` is the ratio of LoRA+, with which the
    factors are trained. On batches with labels, which must be padded on the right as `data.Collator` pads, the model
    computes the loss and the gradients that it did before. With `flat_buffer` the factors then lie in
    `flat.flat_factors(outcomes)`, which the optimizer is made of (see `lean.flat`).
    """
    if settings.lean == "off":
        return {}
    return {piece.name: _put_on(piece, model, settings, lora_plus) for piece in PIECES}


def _put_on(piece: Piece, model: Any, settings: LeanConfig, lora_plus: float | None) -> Outcome:
    wanted = True if piece.setting is None else getattr(settings, piece.setting)
    assert wanted != "auto", "resolve the settings first"
    if wanted in (False, "off"):
        return Outcome(left="switched off")
    put_on = piece.put_on
    if isinstance(put_on, str):
        put_on = importlib.import_module(f"qlora_kit.lean.{put_on}").put_on
    outcome: Outcome = put_on(model, lora_plus) if piece.parts_rates else put_on(model)
    return outcome
