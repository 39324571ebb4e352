"""One buffer behind all factors: the optimizer makes one call, and paged states really page.

    buffer (n,) = [A₁ | 0 … | B₁ | 0 … | A₂ | …]        A (r, K) and B (N, r) are views of it
    update(buffer, gradients) = [update(A₁, ∂A₁) | … | update(B₁, ∂B₁) | …]

r rank, K inputs and N outputs of a layer, n numbers in the buffer. Each view begins at a multiple of 256.

Saves a call of the optimizer for every factor, and the states' memory where they page: bitsandbytes pages no small
tensor, and most factors are small.
Exact: an optimizer updates each number by itself. 8-bit states share a scale in blocks of 256, and no block holds
numbers of two factors.

The factors stay the parameters of their layers, with their names and shapes, so PEFT saves and loads them as before.
Their gradients arrive one by one during the backward pass, as before, and are gathered in a buffer when it is over:
kept in one from the start, they would add their full size to the peak, which is at the beginning of the backward pass.

    factors = put_on(model).made
    optimizer = connect(torch.optim.AdamW(parameter_groups(model, factors, weight_decay)), factors)
    loss.backward()
    clip_gradients(model, factors, 1.0)  # gathers
    optimizer.step()                     # gathers where nobody has clipped; no gradient is left after it
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn

from qlora_kit.adapters import inject
from qlora_kit.lean.piece import Outcome

ALIGNMENT = 256
"""Every factor begins at a multiple of so many elements, the block in which bitsandbytes scales 8-bit states: so no
block spans two factors, and the states are quantized exactly as those of separate tensors."""

SMALL_ELEMENTS = 4096
"""Factors with fewer elements get a buffer of their own, whose states 8-bit optimizers keep in fp32, for bitsandbytes
does so with tensors of that size (`min_8bit_size`)."""

MAX_ELEMENTS = 2**31 - ALIGNMENT
"""bitsandbytes' kernels count the elements of a tensor in 32 bits."""

MAX_ELEMENTS_CPU = 2**20
"""On a CPU a call costs little, and bitsandbytes works on fp32 copies of the whole tensor, seven at once."""


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where factors of so many elements begin in a buffer, and its length; all are multiples of `ALIGNMENT`."""
    starts, length = [], 0
    for size in sizes:
        starts.append(length)
        length += _aligned(size)
    return starts, length


def fill(sizes: Sequence[int], max_elements: int) -> list[range]:
    """Which factors of so many elements, in their order, go into each buffer of at most `max_elements`.

    A factor that is larger by itself is alone in its buffer.
    """
    firsts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + _aligned(size) > max_elements:
            firsts.append(index)
            filled = 0
        filled += _aligned(size)
    return [range(first, end) for first, end in pairwise([*firsts, len(sizes)])]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class FlatBuffer:
    """The buffer behind `factors`, which have one dtype and device.

    `parameter` (N,) holds their values from now on, and its `.grad` their gradients once they are gathered;
    `gradients` are then the parts of it, one a factor. `decays` and `is_fast`: see `parameter_groups`.
    """

    def __init__(self, factors: Sequence[nn.Parameter], decays: bool, is_fast: bool = False) -> None:
        self.factors = list(factors)
        self.decays = decays
        self.is_fast = is_fast
        self._starts, length = layout([p.numel() for p in factors])
        self.parameter = nn.Parameter(torch.zeros(length, dtype=factors[0].dtype, device=factors[0].device))
        self.gradients: list[torch.Tensor] = []
        for factor, view in zip(self.factors, self._views(self.parameter.detach()), strict=True):
            view.copy_(factor.detach())
            factor.data = view

    def _views(self, buffer_N: torch.Tensor) -> list[torch.Tensor]:
        """The part of each factor, in its shape."""
        pairs = zip(self._starts, self.factors, strict=True)
        return [buffer_N[start : start + p.numel()].view(p.shape) for start, p in pairs]

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the gradients into one buffer, zero for a factor that got none; each `.grad` is then its part of it.

        What is gathered already stays. Raises `RuntimeError` where a factor has left the buffer.
        """
        self._check_attached()
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
            self.gradients = self._views(self.parameter.grad)
        pairs = [(v, p) for v, p in zip(self.gradients, self.factors, strict=True) if p.grad is not v]
        arrived = [(view, p.grad) for view, p in pairs if p.grad is not None]
        if arrived:
            torch._foreach_copy_([view for view, _ in arrived], [gradient for _, gradient in arrived])
        for view, factor in pairs:
            if factor.grad is None:
                view.zero_()
            factor.grad = view

    def release(self) -> None:
        """Let the gradients go."""
        self.parameter.grad = None
        self.gradients = []
        for factor in self.factors:
            factor.grad = None

    def _check_attached(self) -> None:
        storage = self.parameter.untyped_storage()._cdata
        if any(p.untyped_storage()._cdata != storage for p in self.factors):
            raise RuntimeError(
                "a factor no longer lies in the flat buffer that the optimizer updates: something has replaced its "
                "data (by moving or casting the model) after the buffer was made"
            )


class FlatFactors:
    """All factors of a model, in one buffer for each kind that the optimizer must tell apart."""

    def __init__(self, buffers: Sequence[FlatBuffer]) -> None:
        self.buffers = list(buffers)

    @property
    def n_bytes(self) -> int:
        """The size of the values."""
        return sum(buffer.parameter.nbytes for buffer in self.buffers)

    def gather(self) -> None:
        """Bring all gradients into the buffers. Raises `RuntimeError` where a factor has left its buffer."""
        for buffer in self.buffers:
            buffer.gather()

    def release(self) -> None:
        """Let all gradients go."""
        for buffer in self.buffers:
            buffer.release()

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Gather the gradients and scale them down to the norm `max_norm` together; their norm before, in fp32.

        The norm is taken factor by factor as torch's own `clip_grad_norm_` does (one sum over millions of elements
        loses digits on a CPU), but in fp32, where torch rounds each to the dtype of the gradients.
        """
        self.gather()
        gradients = [view for buffer in self.buffers for view in buffer.gradients]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)))
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for buffer in self.buffers:
            assert buffer.parameter.grad is not None, "it is gathered"
            buffer.parameter.grad.mul_(scale)
        return norm


def put_on(model: Any, lora_plus: float | None = None) -> Outcome:
    """Lay all factors of `model` side by side, as `FlatFactors`; after that no factor may be moved or cast.

    Under LoRA+, where `lora_plus` is a ratio, A and B lie in buffers of their own.
    """
    named = inject.trainable(model)
    if not named:
        return Outcome(left="nothing trains")
    decaying, fast = decaying_names(model), fast_names(model, lora_plus)
    kinds: dict[tuple[torch.dtype, bool, bool, bool], list[nn.Parameter]] = {}
    for name, factor in named:
        kind = (factor.dtype, name in decaying, name in fast, factor.numel() < SMALL_ELEMENTS)
        kinds.setdefault(kind, []).append(factor)
    buffers = [buffer for (_, *how), factors in kinds.items() for buffer in _lay_out(factors, *how)]
    flat = FlatFactors(buffers)
    count = "one buffer" if len(buffers) == 1 else f"{len(buffers)} buffers"
    return Outcome(done=f"{len(named)} factors in {count} of {flat.n_bytes / 2**20:.1f} MiB", made=flat)


def flat_factors(outcomes: Mapping[str, Outcome]) -> FlatFactors | None:
    """What `put_on` made, among the outcomes of `make_lean`; None where this piece is not on."""
    return next((outcome.made for outcome in outcomes.values() if isinstance(outcome.made, FlatFactors)), None)


def _lay_out(factors: Sequence[nn.Parameter], decays: bool, is_fast: bool, small: bool) -> Iterator[FlatBuffer]:
    """Buffers behind `factors`, which are of one kind."""
    most = MAX_ELEMENTS_CPU if factors[0].device.type == "cpu" else MAX_ELEMENTS
    for indices in fill([p.numel() for p in factors], most):
        buffer = FlatBuffer([factors[i] for i in indices], decays, is_fast)
        if small:
            _keep_fp32_states(buffer.parameter)
        yield buffer


NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Of which parameters do not decay. Source: transformers 5.13 to 5.23, `Trainer.get_decay_parameter_names`."""


def decaying_names(model: Any) -> set[str]:
    """The parameters to which transformers' Trainer applies weight decay: by name, all but norms and biases."""
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))


def fast_names(model: Any, lora_plus: float | None) -> set[str]:
    """The parameters that learn faster under LoRA+: every B, where `lora_plus` is a ratio; else none."""
    if lora_plus is None:
        return set()
    return {name for name, _ in inject.trainable(model) if ".lora_B." in name}


def _keep_fp32_states(parameter: nn.Parameter) -> None:
    """Exempt `parameter` from 8-bit states; bitsandbytes remembers it by its id, which must not outlive it."""
    manager = GlobalOptimManager.get_instance()
    manager.override_config(parameter, "optim_bits", 32)
    weakref.finalize(parameter, manager.pid2config.pop, id(parameter), None)


def parameter_groups(
    model: Any,
    factors: FlatFactors | None,
    weight_decay: float,
    lr: float | None = None,
    lora_plus: float | None = None,
) -> list[dict[str, Any]]:
    """What an optimizer of `model` updates: the buffers of `factors`, or without them every trained parameter.

    Those that decay and those that do not are a group each, as in transformers' Trainer. Under LoRA+ (arXiv
    2402.12354), where `lora_plus` is a ratio, the factors B are groups of their own, after the others, with that many
    times the learning rate `lr`.
    """
    if factors is None:
        decaying, fast = decaying_names(model), fast_names(model, lora_plus)
        trained = [(p, name in decaying, name in fast) for name, p in inject.trainable(model)]
    else:
        trained = [(buffer.parameter, buffer.decays, buffer.is_fast) for buffer in factors.buffers]
    groups = []
    for decays, is_fast in ((True, False), (False, False), (True, True), (False, True)):
        group: dict[str, Any] = {"params": [p for p, *how in trained if how == [decays, is_fast]]}
        group["weight_decay"] = weight_decay if decays else 0.0
        if is_fast and group["params"]:
            assert lr is not None, "LoRA+ multiplies a learning rate"
            assert lora_plus is not None, "or no factor is fast"
            group["lr"] = lr * lora_plus
        groups.append(group)
    return [group for group in groups if group["params"]]


def connect(optimizer: torch.optim.Optimizer, factors: FlatFactors | None) -> torch.optim.Optimizer:
    """Let `optimizer`, which updates the buffers of `factors`, gather before each step and release after it."""
    if factors is not None:
        optimizer.register_step_pre_hook(lambda *_: factors.gather())
        optimizer.register_step_post_hook(lambda *_: factors.release())
    return optimizer


def clip_gradients(model: Any, factors: FlatFactors | None, max_norm: float) -> torch.Tensor:
    """Scale the gradients of `model` down to the norm `max_norm` together, in the buffers where there are some."""
    if factors is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return factors.clip(max_norm)
