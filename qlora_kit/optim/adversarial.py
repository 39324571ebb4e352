"""Adversarial training: each batch a second time, its embeddings moved to where the loss grows.

    L(x) + L(x + δ),    ‖δ‖ ≤ ε
    FGM:  δ = ε · g / ‖g‖                                  g = ∂L/∂x
    PGD:  δ ← project(δ + α · g / ‖g‖, ε), some times      g at x + δ

x, δ, g: (B, T, D) embeddings, for B examples of T tokens and D features; the norms are of each example.

FGM is Miyato, Dai and Goodfellow, arXiv 1605.07725, eq. 5; PGD Madry et al., arXiv 1706.06083. A step takes two forward
and backward passes (FGM), or one more than PGD has steps; and memory for δ, the embeddings and their gradient, and as
an accumulated batch does, for the gradients of the first pass during the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from qlora_kit.config.settings import OptimConfig
from qlora_kit.model.reading import reading_part

T = TypeVar("T")
STRIDE = 2.5  # a step of PGD times their number, in units of ε: enough to reach the border from anywhere (Madry et al.)


def passes_of(config: OptimConfig) -> int:
    """The forward and backward passes over a batch: 1 without an adversary."""
    return {None: 1, "fgm": 2}.get(config.adversarial, 1 + config.adversarial_steps)


class Adversary:
    """Moves what the input embedding of a model gives, in training mode; `step` says when."""

    def __init__(self, model: Any, config: OptimConfig) -> None:
        self.model = model
        self.epsilon = config.adversarial_epsilon
        self.n_passes = passes_of(config)
        self.n_steps = self.n_passes - 1
        self.stride = self.epsilon * STRIDE / self.n_steps if self.n_steps > 1 else self.epsilon
        self.is_on = False
        self.delta_BTD: torch.Tensor | None = None
        self.seen_BTD: torch.Tensor | None = None
        reading_part(model).get_input_embeddings().register_forward_hook(self._move)

    def _move(self, module: Any, args: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
        if not (self.is_on and module.training and torch.is_grad_enabled()):
            return embedded_BTD
        moved_BTD = embedded_BTD if self.delta_BTD is None else embedded_BTD + self.delta_BTD
        if moved_BTD.requires_grad:
            moved_BTD.retain_grad()
        else:
            moved_BTD = moved_BTD.detach().requires_grad_()
        self.seen_BTD = moved_BTD
        return moved_BTD

    def step(self, run: Callable[[], T]) -> T:
        """Run a batch as it is and as the adversary has it; `run` is its forward and backward pass.

        The gradients of both passes add up in the parameters. Returns what the first `run` gave.
        """
        self.is_on = True
        try:
            result = run()
            for n in range(self.n_steps):
                self.delta_BTD = self._next_delta()
                if n == self.n_steps - 1:
                    run()
                else:
                    with _nothing_trains(self.model):
                        run()
            return result
        finally:
            self.is_on, self.delta_BTD, self.seen_BTD = False, None, None

    @torch.no_grad()
    def _next_delta(self) -> torch.Tensor:
        """The next δ, in the dtype of the embeddings; no step for an example whose gradient is zero or no number."""
        assert self.seen_BTD is not None, "the model has embedded its batch"
        assert self.seen_BTD.grad is not None, "and the loss depends on that"
        gradient_BTD = self.seen_BTD.grad
        self.seen_BTD = None
        strides_B = self.stride / _lengths(gradient_BTD)
        delta_BTD = (gradient_BTD * strides_B[:, None, None].to(gradient_BTD.dtype)).nan_to_num_(0.0, 0.0, 0.0)
        if self.delta_BTD is not None:
            delta_BTD += self.delta_BTD
        if self.n_steps > 1:
            shares_B = (self.epsilon / _lengths(delta_BTD)).clamp(max=1)
            delta_BTD *= shares_B[:, None, None].to(delta_BTD.dtype)
        return delta_BTD


def _lengths(x_BTD: torch.Tensor) -> torch.Tensor:
    """The norm (B) of each example, in fp32 at least."""
    wide = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    lengths_B: torch.Tensor = torch.linalg.vector_norm(x_BTD, dim=(1, 2), dtype=wide)
    return lengths_B


@contextmanager
def _nothing_trains(model: Any) -> Iterator[None]:
    """Meanwhile no parameter gets a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
