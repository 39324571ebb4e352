"""The runs that a plan is compared with, each with its recipe in words; a saving depends on which one it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qlora_kit.config.settings import LeanConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.memory import rules
from qlora_kit.memory.plan import MemoryPlan, plan
from qlora_kit.tasks.decoding import NOTHING_HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Another way to train the same model on the same batch: `recipe` in words, `short` the same for a line.

    `default`: it is what one would otherwise run.
    """

    name: str
    title: str
    short: str
    recipe: str
    bits: int
    full: bool
    autocast: bool = False
    default: bool = False

    @property
    def said(self) -> str:
        """Its name in a sentence, with the recipe, without which a saving means nothing."""
        return f"{self.title} ({self.short})"

    def on(self, gpu: rules.Gpu | None) -> Baseline:
        """The same as it runs on `gpu`: in fp16 where that has no bf16."""
        if gpu is None or rules.has_bf16(gpu.capability):
            return self
        in_fp16 = {name: getattr(self, name).replace("bf16", "fp16") for name in ("title", "short", "recipe")}
        return dataclasses.replace(self, **in_fp16)


BASELINES = (
    Baseline(
        name="lora16",
        title="16-bit LoRA",
        short="bf16 base, AdamW",
        recipe="LoRA on a base in bf16, AdamW",
        bits=16,
        full=False,
        default=True,
    ),
    Baseline(
        name="full32",
        title="full fine-tuning",
        short="fp32 weights, bf16 autocast, AdamW",
        recipe="every weight, fp32 under bf16 autocast, AdamW: 16 bytes a parameter",
        bits=32,
        full=True,
        autocast=True,
        default=True,
    ),
    Baseline(
        name="full16",
        title="full fine-tuning",
        short="bf16 weights, AdamW",
        recipe="every weight in bf16, AdamW: 8 bytes a parameter",
        bits=16,
        full=True,
    ),
)


def baseline_plan(
    config: RunConfig, baseline: Baseline, *, checkpointing: bool | None = None, gpu: rules.Gpu | None = None
) -> MemoryPlan:
    """The plan of `baseline` with the batch, length and adapters of `config`: the stock step with `adamw`.

    It is of its step alone, which is what is compared. With it a number in bf16 factors takes 14 bytes in all, where
    stock PEFT's fp32 factors take 16.
    `checkpointing` overrides the run's own. Raises `UserError`.
    """
    optim = dataclasses.replace(config.optim, optim="adamw")
    if checkpointing is not None:
        optim = dataclasses.replace(optim, gradient_checkpointing=checkpointing)
    model = dataclasses.replace(config.base, bits=baseline.bits, full=baseline.full)
    stock = dataclasses.replace(config, base=model, optim=optim, lean=LeanConfig(lean="off"))
    return plan(stock, gpu=gpu, autocast=baseline.autocast, held_out=NOTHING_HELD_OUT)


def possible_plan(
    config: RunConfig, baseline: Baseline, *, checkpointing: bool | None = None, gpu: rules.Gpu | None = None
) -> MemoryPlan | None:
    """The same of a `config` that was planned already; None where its model or the GPU cannot run this baseline."""
    try:
        return baseline_plan(config, baseline, checkpointing=checkpointing, gpu=gpu)
    except UserError:
        return None
