"""The model of a run, put together: base, factors, the pieces of its step, and what trains them.

The trainer and the planner both build it here, so that a change to the one changes the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import inject, unquantized
from qlora_kit.config.settings import OptimConfig, RunConfig
from qlora_kit.errors import UserError, named
from qlora_kit.lean import flat
from qlora_kit.lean.apply import loads_embedding_on_host, make_lean
from qlora_kit.lean.piece import Outcome
from qlora_kit.model import load
from qlora_kit.model.device import compute_dtype
from qlora_kit.model.reading import reading_part
from qlora_kit.optim.optimizers import optimizer_named
from qlora_kit.system import host_memory
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from qlora_kit.optim.adversarial import Adversary
    from qlora_kit.optim.kind import Groups, PlannedDevice


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that is ready to train, and what its step needs beside it; by default the stock step.

    `outcomes`: what the pieces of the lean step did, by their names. `adversary` runs each batch again;
    `rank_penalty` is the weight of the penalty on the rank of the change, and `lora_plus` the ratio of LoRA+.
    """

    model: Any
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    adversary: Adversary | None = None
    rank_penalty: float | None = None
    lora_plus: float | None = None

    @property
    def factors(self) -> flat.FlatFactors | None:
        """The buffers that the factors lie in; None where they lie apart, or nothing but factors trains."""
        return flat.flat_factors(self.outcomes)

    def make_optimizer(self, settings: OptimConfig, optim: str) -> torch.optim.Optimizer:
        """The optimizer `optim` of what trains, over the buffers where there are some."""
        made = optimizer_named(optim).make(self.model, self._groups(settings), settings.lr)
        return flat.connect(made, self.factors)

    def plan_optimizer(self, settings: OptimConfig, optim: str, device: PlannedDevice) -> torch.optim.Optimizer:
        """What allocates on `meta` as that optimizer would on `device`."""
        made = optimizer_named(optim).on_meta(self.model, self._groups(settings), settings.lr, device)
        return flat.connect(made, self.factors)

    def _groups(self, settings: OptimConfig) -> Groups:
        return flat.parameter_groups(self.model, self.factors, settings.weight_decay, settings.lr, self.lora_plus)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients down to the norm `max_norm` together; their norm before."""
        return flat.clip_gradients(self.model, self.factors, max_norm)


def build_model(config: RunConfig, device: torch.device, architecture: PretrainedConfig | None = None) -> Built:
    """The base with its factors on `device`, ready to train; the factors are drawn by `config.seed`.

    A model that trains every weight keeps the stock step.
    Where CUDA has no bf16 the factors are fp32, for fp16 training scales their gradients. `architecture` overrides
    the one that the settings name; see `load.load_base`. Raises `UserError`, for a base that 4 or 8 bits leave in 16
    before it is loaded.
    """
    with host_memory.building(device.type):
        return _assemble(config, device, architecture)


def _assemble(config: RunConfig, device: torch.device, architecture: PretrainedConfig | None) -> Built:
    import torch

    in_fp16 = compute_dtype(config.base, device) == torch.float16
    if config.base.full and in_fp16:
        rule = "cannot train 16-bit weights on a device without bf16"
        raise UserError.of("full", True, rule, f"Use {named('bits', 32)}, or train adapters.")
    own_code = config.base.trust_remote_code  # which is run by its loading alone
    if device.type != "meta" and not own_code and unquantized.may_refuse(config):
        unquantized.check(config, unquantized.foresee(config, architecture))
    lean = config.lean.resolved("cuda" if device.type == "meta" else device.type)
    model = _load(config, device, architecture, loads_embedding_on_host(lean))
    if not config.base.full:
        model = _with_factors(model, config, device, in_fp16)
        unquantized.check(config, model)
    if config.optim.gradient_checkpointing:
        enable_checkpointing(model)
    lora_plus = None if config.base.full else config.optim.lora_plus
    outcomes = {} if config.base.full else make_lean(model, lean, lora_plus)
    return _regularized(Built(model=model, outcomes=outcomes, lora_plus=lora_plus), config)


def _load(
    config: RunConfig, device: torch.device, architecture: PretrainedConfig | None, embedding_on_host: bool
) -> Any:
    """The base, with the loss of its task; leaves torch's random state at the seed."""
    from transformers import set_seed

    from qlora_kit.model.heads import put_loss_on

    on_host = embedding_on_host and not config.base.full
    model: Any = load.load_base(config.base, device, config.seed, architecture, embedding_on_host=on_host)
    task = registry.task_of(config.base, model.config).model
    if task.replaces_loss:
        put_loss_on(model, task)
    if device.type != "meta":  # a plan draws nothing, and leaves the caller's random state alone
        set_seed(config.seed)
    return model


def _with_factors(model: Any, config: RunConfig, device: torch.device, in_fp16: bool) -> Any:
    settings = dataclasses.replace(config.adapter, adapter_dtype="fp32") if in_fp16 else config.adapter
    task = registry.task_of(config.base, model.config).model
    with device if device.type == "meta" else nullcontext():  # copies of weights that PEFT makes stay there
        return inject.inject(model, settings, task, originals=_originals(config, device))


def _regularized(built: Built, config: RunConfig) -> Built:
    """`built` with what disturbs or penalizes its training; none of it acts in evaluation mode."""
    if config.optim.neftune is not None:
        from transformers.integrations.neftune import activate_neftune  # Jain et al., arXiv 2310.05914

        activate_neftune(reading_part(built.model), config.optim.neftune)
    adversary = None
    if config.optim.adversarial is not None:
        from qlora_kit.optim.adversarial import Adversary

        adversary = Adversary(built.model, config.optim)
    rank_penalty = None if config.base.full else config.optim.rank_penalty
    return dataclasses.replace(built, adversary=adversary, rank_penalty=rank_penalty)


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
        raise UserError.of("gradient_checkpointing", True, rule, f"Use {named('gradient_checkpointing', False)}.")
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if hasattr(model, "get_base_model"):  # the embedding's output would get a gradient, which reentrant ones need
        model.get_base_model().disable_input_require_grads()
