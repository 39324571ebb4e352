"""Random numbers by layer: the same weights for a layer whatever is drawn before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def drawn_by(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Within, torch draws by `seed` and the layer's `name`; afterwards its random state is as before."""
    import torch

    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(layer_seed)
        yield
