"""Which part of a model reads what it is given."""

from __future__ import annotations

from typing import Any


def reading_part(model: Any) -> Any:
    """What the inputs of `model` (which may be PEFT's) go through first: of an encoder and a decoder the encoder.

    Its embedding is the one that is called; T5 and BART have another module with the same weight, which is not.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return own.get_encoder() if own.config.is_encoder_decoder else own
