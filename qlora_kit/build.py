"""The model of a run, put together: base, factors, and the pieces of its step.

The trainer and the planner both build it here, so that a change to the one changes the other.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import inject, unquantized
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.lean.apply import loads_embedding_on_host, make_lean
from qlora_kit.model import load
from qlora_kit.model.device import compute_dtype
from qlora_kit.model.reading import reading_part
from qlora_kit.system import host_memory
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def build_model(config: RunConfig, device: torch.device, architecture: PretrainedConfig | None = None) -> Any:
    """The base with its factors on `device`, ready to train; the factors are drawn by `config.seed`.

    What the lean step did to it stands in its `lean_outcomes`; a model that trains every weight keeps the stock step.
    Where CUDA has no bf16 the factors are fp32, for fp16 training scales their gradients. `architecture` overrides
    the one that the settings name; see `base.load_base`. Raises `UserError`, for a base that 4 or 8 bits leave in 16
    before it is loaded.
    """
    with host_memory.building(device.type):
        return _assemble(config, device, architecture)


def _assemble(config: RunConfig, device: torch.device, architecture: PretrainedConfig | None) -> Any:
    import torch
    from transformers import set_seed

    from qlora_kit.model.heads import put_loss_on

    in_fp16 = compute_dtype(config.base, device) == torch.float16
    if config.base.full and in_fp16:
        rule = "cannot train 16-bit weights on a device without bf16"
        raise UserError.of("--full", True, rule, "Use --bits 32, or adapters.")
    own_code = config.base.trust_remote_code  # which is run by its loading alone
    if device.type != "meta" and not own_code and unquantized.may_refuse(config):
        unquantized.check(config, unquantized.foresee(config, architecture))
    lean = config.lean.resolved("cuda" if device.type == "meta" else device.type)
    on_host = loads_embedding_on_host(lean) and not config.base.full
    model: Any = load.load_base(config.base, device, config.seed, architecture, embedding_on_host=on_host)
    task = registry.task_of(config.base, model.config).model
    if task.replaces_loss:
        put_loss_on(model, task)
    if device.type != "meta":  # a plan draws nothing, and leaves the caller's random state alone
        set_seed(config.seed)
    if not config.base.full:
        with device if device.type == "meta" else nullcontext():  # copies of weights that PEFT makes stay there
            settings = dataclasses.replace(config.adapter, adapter_dtype="fp32") if in_fp16 else config.adapter
            model = inject.inject(model, settings, task, originals=_originals(config, device))
        unquantized.check(config, model)
    if config.optim.gradient_checkpointing:
        enable_checkpointing(model)
    model.lora_plus = None if config.base.full else config.optim.lora_plus  # the flat buffers keep A and B apart by it
    model.lean_outcomes = {}
    if not config.base.full:
        model.lean_outcomes = make_lean(model, lean)
    _regularize(model, config)
    return model


def _regularize(model: Any, config: RunConfig) -> None:
    """Put on `model` what disturbs or penalizes its training; none of it acts in evaluation mode."""
    if config.optim.neftune is not None:
        from transformers.integrations.neftune import activate_neftune  # Jain et al., arXiv 2310.05914

        activate_neftune(reading_part(model), config.optim.neftune)
    model.adversary = None
    if config.optim.adversarial is not None:
        from qlora_kit.optim.adversarial import Adversary

        model.adversary = Adversary(model, config.optim)
    model.rank_penalty = None if config.base.full else config.optim.rank_penalty


def _originals(config: RunConfig, device: torch.device) -> Any:
    """The base before it was quantized, where the factors begin at what that did to it; else None."""
    if config.adapter.init != "loftq" or config.base.bits > 8 or device.type == "meta":
        return None
    return load.load_originals(config.base, device, config.seed)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, without reentrance so that frozen inputs need no gradient.

    Raises `UserError` where transformers does not checkpoint the architecture.
    """
    if not model.supports_gradient_checkpointing:
        rule = f"a {model.config.model_type} model cannot be checkpointed"
        raise UserError.of("--gradient-checkpointing", True, rule, "Use --no-gradient-checkpointing.")
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if hasattr(model, "get_base_model"):  # the embedding's output would get a gradient, which reentrant ones need
        model.get_base_model().disable_input_require_grads()
