"""Factors made of parts, of which only one trains; for PEFT and in its files they are plain factors.

    HalfFrozen:  B = [B₁ | −B₀] (N, 2r),  A = [A₁; A₀] (2r, K),  so B·A = B₁·A₁ − B₀·A₀;  B₁ and A₁ train
    CoreFactor:  B = left · core,  left: (N, r), core: (r, r), A: (r, K),  so B·A = left·core·A;  the core trains

K inputs, N outputs of the layer, r rank.

Such a module takes the place of PEFT's `nn.Linear` for A or B. Its `weight` is the whole factor, computed from its
parts at each use, and its state dict holds nothing else: so an adapter on disk is plain LoRA on the published base, and
loading, serving and merging need not know. Only to resume training needs the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PARTS_FILE = "adapter_parts.safetensors"


class PartedFactor(nn.Module):
    """A factor of which some parts stay frozen.

    These are buffers: PEFT lets every parameter of an adapter train whenever it is switched on.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The whole factor, (r, K) for A and (N, r) for B, in the dtype of its frozen part."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` times the factor's transpose."""
        return nn.functional.linear(x, self.weight)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take over a whole factor from a file, as far as the parts follow from it."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        with torch.no_grad():
            self.set_weight(state_dict[key])


class HalfFrozen(PartedFactor):
    """A factor of twice the rank: the half that trains, and one that stays as it was when training began.

    In A the halves are stacked, in B side by side, the frozen one there negative. So B·A is the change since
    the beginning, B₁·A₁ − B₀·A₀, and zero at first.
    """

    frozen: torch.Tensor

    def __init__(self, trained: torch.Tensor, frozen: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.trained = nn.Parameter(trained)
        self.register_buffer("frozen", frozen)
        self.dim = dim

    @property
    def weight(self) -> torch.Tensor:
        """Both halves."""
        return torch.cat([self.trained, self.frozen], self.dim)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take over both halves."""
        trained, frozen = weight.chunk(2, self.dim)
        self.trained.copy_(trained)
        self.frozen = frozen.to(self.frozen.device, copy=True).contiguous()


class Frozen(PartedFactor):
    """A factor of which nothing trains: the A of LoRA-XS."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)

    @property
    def weight(self) -> torch.Tensor:
        """The factor."""
        return self.frozen

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take it over."""
        self.frozen = weight.to(self.frozen.device, copy=True)


class CoreFactor(PartedFactor):
    """The B of LoRA-XS: a frozen `left` (N, r) times a `core` (r, r), which trains.

    The core is kept in fp32 whatever the dtype of the factors: it costs nothing, and loses no small step.
    """

    left: torch.Tensor

    def __init__(self, left: torch.Tensor) -> None:
        super().__init__()
        r = left.shape[1]
        self.register_buffer("left", left)
        self.core = nn.Parameter(torch.zeros(r, r, dtype=torch.float32, device=left.device))

    @property
    def weight(self) -> torch.Tensor:
        """The product of both."""
        return self.left @ self.core.to(self.left.dtype)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Nothing: the product does not say what the parts are; `load_parts` brings them."""


def save_parts(model: nn.Module, folder: Path) -> None:
    """Write the parts that do not follow from the factors of `model` beside them; no file if there are none."""
    from safetensors.torch import save_file

    found = {name: part.detach().cpu().contiguous() for name, part in hidden_parts(model)}
    if found:
        save_file(found, folder / PARTS_FILE, {"format": "pt"})


def differences(model: nn.Module, folder: Path) -> list[str]:
    """The differences between the parts in `folder` and those of `model`; raises `OSError` if the file is missing."""
    from safetensors.torch import load_file

    parts = dict(hidden_parts(model))
    saved = load_file(folder / PARTS_FILE) if parts else {}
    same = {name for name in parts.keys() & saved.keys() if torch.equal(parts[name].detach().cpu(), saved[name])}
    return [f"{name}: not as in {PARTS_FILE}" for name in sorted((parts.keys() | saved.keys()) - same)]


def load_parts(model: nn.Module, folder: Path) -> None:
    """Give the parts of the factors of `model` the values that `save_parts` wrote, exactly.

    Raises `RuntimeError` if they do not fit, and `OSError` if the file is missing.
    """
    from safetensors.torch import load_file

    parts = dict(hidden_parts(model))
    if not parts:
        return
    saved = load_file(folder / PARTS_FILE)
    wrong = sorted(parts.keys() ^ saved.keys())
    wrong += sorted(name for name in parts.keys() & saved.keys() if parts[name].shape != saved[name].shape)
    if wrong:
        raise RuntimeError(f"{folder / PARTS_FILE} does not fit the adapter: {', '.join(wrong)}")
    with torch.no_grad():
        for name, part in parts.items():
            part.data = part.data.to(saved[name].dtype)
            part.copy_(saved[name])


def frozen_bytes(model: nn.Module) -> int:
    """The bytes of all parts that do not train."""
    parts = (part for module in model.modules() if isinstance(module, PartedFactor) for part in module.buffers())
    return sum(part.nbytes for part in parts)


def hidden_parts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts that a factor's product hides, by name."""
    for name, module in model.named_modules():
        if isinstance(module, CoreFactor):
            yield f"{name}.left", module.left
            yield f"{name}.core", module.core
