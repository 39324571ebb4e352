"""The weights that stay in 16 bits at 4 or 8: those outside the layers that bitsandbytes and PEFT know.

transformers keeps the experts of a mixture in 3-D parameters of the block itself. bitsandbytes quantizes linear layers,
and PEFT adapts them; so most of such a model stays as it was, and neither library says so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import inject
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError, named
from qlora_kit.model import load, quantize
from qlora_kit.model.blocks import block_of
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MINOR = 0.05  # share of the model; convolutions and tables of positions in the blocks are less, experts are more
BYTES = 2  # of a weight in 16 bits


@dataclass(frozen=True, kw_only=True)
class Unquantized:
    """Matrices, or stacks of them, in the blocks that belong to no linear layer and no embedding.

    `without_factors` of these `weights` get no factors; `total` counts the weights of the whole model.
    """

    example: str
    weights: int
    without_factors: int
    total: int

    @property
    def is_minor(self) -> bool:
        """Whether they are too few to matter."""
        return self.weights < MINOR * self.total

    @property
    def said(self) -> str:
        """How many they are: `95.0% of the model's weights (54.02 GiB)`."""
        mebibytes = self.weights * BYTES / 2**20
        size = f"{mebibytes:.2f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f} GiB"
        return f"{self.said_of_share} ({size})"

    @property
    def said_of_share(self) -> str:
        """The same without their bytes."""
        return f"{self.weights / self.total:.1%} of the model's weights"

    @property
    def said_of_factors(self) -> str:
        """How many of them get no factors, in a sentence about them."""
        if self.without_factors == self.weights:
            return "none of them gets factors to train"
        return f"{self.without_factors / self.weights:.1%} of them get no factors to train"


def find(model: Any) -> Unquantized:
    """The unquantized weights of `model`, with or without factors, on any device."""
    from peft.tuners.lora.layer import ParamWrapper

    adapted = {id(module.get_param()) for module in model.modules() if isinstance(module, ParamWrapper)}
    found = dict(_weights(model))
    bare = (p for p in found.values() if id(p) not in adapted)
    largest = max(found, key=lambda name: found[name].numel(), default="")
    return Unquantized(
        example=largest.replace("base_layer.", "").removeprefix("base_model.model."),
        weights=sum(p.numel() for p in found.values()),
        without_factors=sum(p.numel() for p in bare),
        total=quantize.count_parameters(model).total - sum(p.numel() for _, p in inject.adapter_parameters(model)),
    )


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """The matrices in the blocks that are in no linear layer; one that is linear and stays was left on purpose."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or "lora_" in name:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and block_of(name) is not None:
                yield f"{name}.{own}", parameter


def foresee(config: RunConfig, architecture: PretrainedConfig | None = None) -> Any:
    """The base of `config` on `meta`, so that `find` and `check` can look at it before anything is loaded.

    `architecture` overrides the one that the settings name. Raises `UserError` for a model that is not found.
    """
    import torch

    plain = dataclasses.replace(config.base, bits=16, full=False)
    return load.load_base(plain, torch.device("meta"), architecture=copy.deepcopy(architecture))


def may_refuse(config: RunConfig) -> bool:
    """Whether `check` can refuse a model of `config`: it is quantized, and 16-bit experts are not allowed."""
    return config.base.bits <= 8 and not config.base.allow_16_bit_experts


def check(config: RunConfig, model: Any) -> None:
    """Raises `UserError` if the bits of `config` leave much of `model` in 16, and the settings do not allow it."""
    if not may_refuse(config):
        return
    found = of_run(config, model)
    if found is not None:
        rule = (
            f"would leave {found.said} in 16 bits, and {found.said_of_factors}: they are stacks of matrices such as "
            f"{found.example} (the experts of a mixture), and only linear layers are quantized"
        )
        remedy = f"Choose a model without experts, or add {named('allow_16_bit_experts', True)} to train it anyway."
        raise UserError.of("bits", config.base.bits, rule, remedy)


def of_run(config: RunConfig, model: Any) -> Unquantized | None:
    """The weights of `model` that the bits of `config` leave in 16, and their factors; None if that is minor.

    With 16 bits and more nothing is quantized: then only the factors matter.

    A `model` from `foresee` gets its factors here. Raises `UserError`.
    """
    if config.base.full or find(model).is_minor:
        return None
    if not hasattr(model, "peft_config"):  # where they go is what counts
        settings = dataclasses.replace(config.adapter, variant="lora", init="default", dora=False)
        with model.device:
            model = inject.inject(model, settings, registry.task_of(config.base, model.config).model)
    return find(model)
