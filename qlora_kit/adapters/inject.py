"""Puts the LoRA factors on the base, and checks their first gradients.

PEFT does the injection; its files are the format that every other tool reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import initialization
from qlora_kit.adapters.targets import choose_targets, linear_layers, matches, ranks_of
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

LANGUAGE_MODEL = "CAUSAL_LM"  # as PEFT calls one


def inject(
    model: PreTrainedModel, config: AdapterConfig, task: TaskModel | None = None, *, originals: nn.Module | None = None
) -> PeftModel:
    """Put trainable factors in `adapter_dtype` on the frozen `model`, with the initial values that `config` asks for.

    By default A is drawn from torch's random state and B is zero. `originals` is the base before quantization, for
    LoftQ. A head that `task` puts on the model trains in full, in its own dtype, and is saved with the factors; without
    a task the model keeps its own head, as a language model does.
    Raises `UserError` for targets that match nothing and for combinations that the libraries cannot train.
    """
    import torch
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    from qlora_kit.model.heads import head_names

    if config.dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        rule = "does not work on 8-bit layers on a CPU (PEFT's DoRA loses their scales at the second step)"
        remedy = f"Use {named('bits', 4)} or 16, or a CUDA device."
        raise UserError.of("dora", True, rule, remedy)
    assert task is not None or model.can_generate(), "a new head trains in full: say which task put it there"
    targets = choose_targets(model, config.targets, config.blocks)
    chosen = {name: m for name, m in linear_layers(model).items() if any(matches(name, t) for t in targets)}
    ranks_of(chosen, config)
    halves = 2 if config.doubles_rank else 1
    settings = LoraConfig(
        r=halves * config.r,
        lora_alpha=config.alpha_of(halves * config.r),
        rank_pattern={name: halves * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: config.alpha_of(halves * r) for name, r in config.rank_pattern.items()},
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in chosen.values()),  # unquantized GPT-2 stores in × out
        modules_to_save=(head_names(model) or None) if task is not None and task.has_new_head else None,
        task_type=LANGUAGE_MODEL if task is None else task.peft_type,
    )
    peft_model = _adapted(model, settings, targets)
    pass_all_inputs(peft_model)
    dtype = torch.bfloat16 if config.adapter_dtype == "bf16" else torch.float32
    for _, parameter in adapter_parameters(peft_model):
        parameter.data = parameter.data.to(dtype)
    initialization.start(peft_model, config, originals)
    return peft_model


def _adapted(model: PreTrainedModel, settings: LoraConfig, targets: Sequence[str]) -> PeftModel:
    """PEFT's model with these `settings`. Raises `UserError` if it cannot adapt the `targets`."""
    from peft import get_peft_model

    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    try:
        return get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        rule = f"PEFT cannot adapt these layers of a {model.config.model_type} model ({str(error).rstrip('.')})"
        remedy = "The model has no linear layer in a block."
        if names:
            remedy = f"Choose from {named('targets', ','.join(names))}."
        raise UserError.of("targets", ",".join(targets), rule, remedy) from None


def pass_all_inputs(model: PeftModel) -> None:
    """Let the base get all that `model` is called with: PEFT drops token types and positions when it answers questions.

    (`PeftModelForQuestionAnswering.forward` names them, and passes them on to prompts alone.)
    """
    from peft import PeftModel, PeftModelForQuestionAnswering

    if isinstance(model, PeftModelForQuestionAnswering):
        model.forward = MethodType(PeftModel.forward, model)


def trainable(model: nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that train, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def check_first_gradients(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Check the gradients of the first step: all there and finite, and those of every B non-zero.

    (Those of A are zero while B is.) Raises `UserError` naming the factors at fault.
    """
    faults = []
    for name, parameter in parameters:
        if parameter.grad is None:
            faults.append((name, "gets no gradient"))
        elif not bool(parameter.grad.isfinite().all()):
            faults.append((name, "gets a gradient that is not finite"))
        elif "lora_B" in name and not bool(parameter.grad.any()):
            faults.append((name, "gets a gradient of zero"))
    if faults:
        remedy = (
            "Look at the data with `qlora-kit preview`, "
            f"and try {named('adapter_dtype', 'fp32')} or other {named('targets')}."
        )
        raise UserError(Fault(name, "gradient at step 1", rule, remedy) for name, rule in faults)


def adapter_parameters(model: PeftModel) -> list[tuple[str, Any]]:
    """Every parameter of the factors, trainable or not, with its name; those of a head are not among them."""
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]
