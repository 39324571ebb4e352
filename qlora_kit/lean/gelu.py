"""`gelu_new`, which transformers works out in eight operations, as one of torch's.

    gelu_new(x) = 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) = nn.GELU(approximate="tanh")(x)

x: (B, T, I), for B rows, T positions and I intermediate features.

Saves the tensors between the operations: for the backward pass torch's kernel keeps x alone.
Exact: the same function. torch's kernel works in fp32 inside and rounds once, so in bf16 it is closer to the function
than the eight operations, each of which rounds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

from qlora_kit.lean.piece import Outcome

SAME_FUNCTION = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)


def put_on(model: Any) -> Outcome:
    """Replace each module of `model` that computes `gelu_new` step by step, wherever it hangs."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SAME_FUNCTION)
    ]
    for parent, name in places:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    if not places:
        return Outcome(left="no gelu_new in this model")
    return Outcome(done=f"{len(places)} activations")
