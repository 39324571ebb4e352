"""What an optimizer that `--optim` names has to be: how a run makes it, and what stands for it in a plan.

A new optimizer is a file in this folder with one class of this kind, and one line in `optimizers.OPTIMIZERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Groups = list[dict[str, Any]]
"""What an optimizer updates, as torch takes it; each group has its `weight_decay`, and under LoRA+ some their `lr`."""

BETAS, EPS = (0.9, 0.999), 1e-8  # as transformers' Trainer sets them


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """The device that a plan on `meta` is for: its type, and what its optimizer pages.

    `growth`: how many times as many elements a parameter has in the model that is planned as in the one that is
    simulated. `paged` takes the states that lie in managed memory, which torch does not count.
    """

    type: str
    growth: float = 1.0
    paged: list[torch.Tensor] = field(default_factory=list)


class OptimizerKind(ABC):
    """One optimizer by its name."""

    @abstractmethod
    def make(self, model: Any, groups: Groups, lr: float) -> torch.optim.Optimizer:
        """The optimizer of `groups`, which are of `model`, with the learning rate `lr`."""

    def on_meta(self, model: Any, groups: Groups, lr: float, device: PlannedDevice) -> torch.optim.Optimizer:
        """What allocates on `meta` as this optimizer does on `device`; by default itself.

        It needs another where torch or a library refuses `meta`, or calls other kernels there.
        """
        return self.make(model, groups, lr)
