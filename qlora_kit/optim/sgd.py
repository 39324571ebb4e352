"""torch's SGD, without momentum: it keeps no states."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.optim.kind import Groups, OptimizerKind, PlannedDevice


class _SGD(OptimizerKind):
    def make(self, model: Any, groups: Groups, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr)

    def on_meta(self, model: Any, groups: Groups, lr: float, device: PlannedDevice) -> torch.optim.Optimizer:
        """What torch does: it takes all parameters at once on CUDA, and one by one on a CPU."""
        return torch.optim.SGD(groups, lr=lr, foreach=device.type == "cuda")


SGD = _SGD()
