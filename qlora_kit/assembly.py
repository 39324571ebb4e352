"""The model of a run, put together: base, factors, and the switches of its step.

The trainer and the planner both build it here, so that a change to the one changes the other.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from qlora_kit import adapters, base
from qlora_kit.config import RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def build_model(config: RunConfig, device: torch.device, architecture: PretrainedConfig | None = None) -> Any:
    """The base with its factors on `device`, ready to train; the factors are drawn by `config.seed`.

    `architecture` overrides the one that the settings name; see `base.load_base`. Raises `UserError`.
    """
    from transformers import set_seed

    model: Any = base.load_base(config.base, device, config.seed, architecture)
    if device.type != "meta":  # a plan draws nothing, and leaves the caller's random state alone
        set_seed(config.seed)
    if not config.base.full:
        with device if device.type == "meta" else nullcontext():  # copies of weights that PEFT makes stay there
            model = adapters.inject(model, config.adapter)
    if config.optim.gradient_checkpointing:
        _enable_checkpointing(model)
    return model


def _enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, without reentrance so that frozen inputs need no gradient."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
