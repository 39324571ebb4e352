"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math
from typing import Any

from qlora_kit.config.settings import OptimConfig, RunConfig


def planned_steps(config: RunConfig, rows: int) -> int:
    """The optimizer steps of a run over `rows` training rows, as the Trainer counts them."""
    if config.optim.max_steps is not None:
        return config.optim.max_steps
    batches = math.ceil(rows / config.optim.batch_size)
    return math.ceil(config.optim.epochs * math.ceil(batches / config.optim.grad_accum))


def warmup_steps(share: float, total: int) -> int:
    """The steps spent warming up in a run of `total`."""
    return int(share * total)


def share_of_rate(optim: OptimConfig, total: int, step: int) -> float:
    """The learning rate of a step (from 0) of a run of `total`, as a share of `lr`, as the Trainer's scheduler says."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
    scheduler: Any = get_scheduler(optim.schedule, optimizer, warmup_steps(optim.warmup, total), total)
    return float(scheduler.lr_lambdas[0](step))
