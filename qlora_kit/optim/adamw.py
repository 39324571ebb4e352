"""torch's fused AdamW; for bf16 factors `SplitAdamW`, which holds them to fp32."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.adapters import inject
from qlora_kit.optim.kind import BETAS, EPS, Groups, OptimizerKind, PlannedDevice
from qlora_kit.optim.split_adamw import SplitAdamW


class _AdamW(OptimizerKind):
    def make(self, model: Any, groups: Groups, lr: float) -> torch.optim.Optimizer:
        if trains_split(model):
            return SplitAdamW(groups, lr=lr, betas=BETAS, eps=EPS)
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)

    def on_meta(self, model: Any, groups: Groups, lr: float, device: PlannedDevice) -> torch.optim.Optimizer:
        return SplitAdamW(groups, lr=lr) if trains_split(model) else MetaFusedAdamW(groups, lr=lr)


ADAMW = _AdamW()


def trains_split(model: Any) -> bool:
    """Whether `adamw` holds what trains to fp32, as it does bf16 factors; a whole model in bf16 stays at 8 bytes."""
    is_adapter = hasattr(model, "peft_config")
    return is_adapter and any(p.dtype == torch.bfloat16 for _, p in inject.trainable(model))


class MetaFusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW as it is to memory: states and no temporaries. torch itself refuses to fuse on `meta`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of every parameter that has a gradient and none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is not None and not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
