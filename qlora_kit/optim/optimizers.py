"""The optimizers by their names, and how one is made of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Trainer,
    TrainingArguments,
)

from qlora_kit.adapters import inject
from qlora_kit.config.settings import RunConfig
from qlora_kit.lean import flat
from qlora_kit.optim import paged_states
from qlora_kit.optim.split_adamw import SplitAdamW

if TYPE_CHECKING:
    pass
OPTIMIZERS = {  # ours → transformers'
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "adamw": "adamw_torch_fused",  # for bf16 factors: `SplitAdamW`
    "adamw_8bit": "adamw_8bit",
    "lion_8bit": "lion_8bit",
    "sgd": "sgd",
}


def resolve_optim(config: RunConfig, device: torch.device) -> str:
    """The optimizer: as told, or by default paged 8-bit AdamW at 4 bits on CUDA, else torch's AdamW.

    On a CPU bitsandbytes' 8-bit kernels compile for seconds at every new shape and nothing pages.
    """
    if config.optim.optim is not None:
        return config.optim.optim
    return "paged_adamw_8bit" if config.base.bits == 4 and device.type == "cuda" else "adamw"


def make_optimizer(model: Any, config: RunConfig, optim: str) -> torch.optim.Optimizer:
    """The optimizer `optim` for `model`, as a run makes it, for steps outside a run."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    arguments = TrainingArguments(
        optim=OPTIMIZERS[optim],
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        use_cpu=on_cpu,
        report_to=[],
    )
    return _optimizer_of(model, arguments)


def _optimizer_of(model: Any, arguments: TrainingArguments) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = flat.parameter_groups(model, arguments.weight_decay, arguments.learning_rate)
    if kind is torch.optim.AdamW and trains_split(model):
        kind = SplitAdamW
        del options["fused"]
    optimizer = kind(groups, **options)
    paged_states.take_over(optimizer)
    return flat.connect(model, optimizer)


def trains_split(model: Any) -> bool:
    """Whether `adamw` holds what trains to fp32, as it does bf16 factors; a whole model in bf16 stays at 8 bytes."""
    return _is_adapter(model) and any(p.dtype == torch.bfloat16 for _, p in inject.trainable(model))


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")
