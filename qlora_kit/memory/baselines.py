"""The runs that a plan is compared with, each with its recipe in words; a saving depends on which one it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qlora_kit.config import LeanConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.memory import rules
from qlora_kit.memory.plan import MemoryPlan, plan


@dataclass(frozen=True)
class Baseline:
    """Another way to train the same model on the same batch."""

    name: str
    recipe: str
    bits: int
    full: bool
    autocast: bool = False


BASELINES = (
    Baseline("lora16", "LoRA on a base in bf16, AdamW", 16, False),
    Baseline(
        "full32",
        "every weight, fp32 under bf16 autocast, AdamW: 16 bytes a parameter",
        32,
        True,
        True,
    ),
    Baseline("full16", "every weight in bf16, AdamW: 8 bytes a parameter", 16, True),
)


def baseline_plan(
    config: RunConfig, baseline: Baseline, *, checkpointing: bool | None = None, gpu: rules.Gpu | None = None
) -> MemoryPlan:
    """The plan of `baseline` with the batch, length and adapters of `config`: the stock step with torch's AdamW.

    `checkpointing` overrides the run's own. Raises `UserError`.
    """
    optim = dataclasses.replace(config.optim, optim="adamw")
    if checkpointing is not None:
        optim = dataclasses.replace(optim, gradient_checkpointing=checkpointing)
    model = dataclasses.replace(config.base, bits=baseline.bits, full=baseline.full)
    stock = dataclasses.replace(config, base=model, optim=optim, lean=LeanConfig(lean="off"))
    return plan(stock, gpu=gpu, autocast=baseline.autocast)


def possible_plan(
    config: RunConfig, baseline: Baseline, *, checkpointing: bool | None = None, gpu: rules.Gpu | None = None
) -> MemoryPlan | None:
    """The same of a `config` that was planned already; None where its model or the GPU cannot run this baseline."""
    try:
        return baseline_plan(config, baseline, checkpointing=checkpointing, gpu=gpu)
    except UserError:
        return None
