"""The input embedding in the host's memory, as a piece of the lean step.

    x = E[ids]        E: (V, D) on the host;  ids: (B, T);  x: (B, T, D) on the device

B rows, T positions, V tokens of the vocabulary, D features.

Saves the V · D numbers of E on the device; the ids go to the host and x comes back.
Exact: a lookup copies rows. E must be frozen, so nothing has to travel back, and the head must have another weight.
A model is loaded so (`model/host_embedding.py`); one that was not is changed here.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.lean.piece import Outcome
from qlora_kit.model.host_embedding import HostEmbedding, move_to_host, why_not

__all__ = ["HostEmbedding", "move_to_host", "put_on"]


def put_on(model: Any) -> Outcome:
    """Have the input embedding of `model` on the host, where it is frozen and the head has another weight."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, HostEmbedding):
        reason = _why_not(model, embedding)
        if reason:
            return Outcome(left=reason)
        move_to_host(embedding)
    return Outcome(done=f"{embedding.weight.nbytes / 2**20:,.1f} MiB")


def _why_not(model: Any, embedding: Any) -> str:
    reason = why_not(model, embedding)
    if reason:
        return reason
    if embedding.weight.device.type == "cpu":
        return "the model is on the host already"
    return "it trains" if embedding.weight.requires_grad else ""
