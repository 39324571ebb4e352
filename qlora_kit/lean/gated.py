"""The product of a gated MLP, which keeps two wide tensors for the backward pass instead of three.

    y  = act(g) · u
    ∂u = act(g) · ∂y,    ∂g = act′(g) · (u · ∂y)

g (the gate), u (the up projection) and y: (N, I), for N tokens and I intermediate features.

Saves act(g), which autograd keeps beside g and u: N · I numbers for each MLP.
Exact: act(g) is computed again by the same kernel, and the backward pass runs the operators that autograd would, in the
buffers that it needs for its results anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation, and its gradient from the one of its result: `backward(grad, x, grad_input=buffer)`."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[..., torch.Tensor]


SILU = Activation(nn.functional.silu, aten.silu_backward.grad_input)
TANH_GELU = Activation(
    functools.partial(nn.functional.gelu, approximate="tanh"),
    functools.partial(aten.gelu_backward.grad_input, approximate="tanh"),
)


def known_activation(module: nn.Module) -> Activation | None:
    """What `module` computes, by the names that torch and transformers give it; None where it is not known here."""
    name = type(module).__name__
    if name in ("SiLU", "SiLUActivation"):
        return SILU
    inner = getattr(module, "act", None)  # GELUTanh has another way, in Python
    is_tanh = name == "GELUTanh" and isinstance(inner, functools.partial)
    return TANH_GELU if is_tanh or getattr(module, "approximate", "") == "tanh" else None


class Gated(torch.autograd.Function):
    """act(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The product, of the shape of both."""
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """The gradients of gate and up."""
        gate, up = ctx.saved_tensors
        grad_up = ctx.activation.forward(gate).mul_(grad)
        grad_gate = grad * up
        ctx.activation.backward(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up, None
