"""The LoRA factors on the base: where they go, put on, saved, checked, and loaded again.

PEFT injects, saves and loads; its files are the format that every other tool reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from qlora_kit import initialization
from qlora_kit.config import AdapterConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.task_models import GENERATION, TASK_MODELS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks by its full name, whatever its class; the head is not among them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and any(p.isdigit() for p in name.split("."))
    }


def block_of(name: str) -> int:
    """The number of the block that a layer of `linear_layers` is in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def choose_targets(
    model: PreTrainedModel, wanted: tuple[str, ...] | None, blocks: frozenset[int] | None = None
) -> list[str]:
    """The names to give PEFT: `wanted`, or by default all of `linear_layers`, by their shortest unambiguous names.

    With `blocks` they are the full names of the layers in those (in an encoder-decoder model those of both stacks):
    PEFT's own `layers_to_transform` takes no notice of targets that are given by their full names.
    Raises `UserError` where one of `wanted` matches no linear layer, or one of `blocks` is not there.
    """
    layers = linear_layers(model)
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if blocks is not None:
        _check_blocks(blocks, layers)
        names = choose_targets(model, wanted)
        layers = {n: m for n, m in layers.items() if block_of(n) in blocks and any(_matches(n, t) for t in names)}
        if not layers:
            rule = f"is in none of the blocks {_ranges(blocks)}"
            raise UserError.of("--targets", ",".join(wanted or short), rule, "Choose other --layers or --targets.")
        return sorted(layers)
    if wanted is None:
        return _unambiguous(model, layers, short)
    missing = [t for t in wanted if not any(_matches(name, t) for name in layers)]
    if missing:
        remedy = f"This model has: {', '.join(short)}."
        raise UserError(Fault("--targets", target, "matches no linear layer", remedy) for target in missing)
    return _unambiguous(model, [name for name in layers if any(_matches(name, t) for t in wanted)], wanted)


def _unambiguous(model: PreTrainedModel, chosen: Iterable[str], names: Sequence[str]) -> list[str]:
    """`names` where they match the layers `chosen` and no other module (such as a pooler's), else those in full."""
    everywhere = {name for name, _ in model.named_modules() if any(_matches(name, target) for target in names)}
    return list(names) if everywhere == set(chosen) else sorted(chosen)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _check_blocks(blocks: frozenset[int], layers: Iterable[str]) -> None:
    there = {block_of(name) for name in layers}
    if not blocks <= there:
        rule = "names blocks that the model has not"
        raise UserError.of(
            "--layers", _ranges(blocks), f"{rule}: {_ranges(blocks - there)}", f"It has {_ranges(there)}."
        )


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for the numbers 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def ranks_of(names: Iterable[str], config: AdapterConfig) -> dict[str, int]:
    """The rank of each of the layers `names`, as PEFT chooses it: by the first of the patterns that fits.

    Raises `UserError` for patterns that fit none of them.
    """
    names = list(names)
    unused = [p for p in config.rank_pattern if not any(_matches(name, p) for name in names)]
    if unused:
        short = sorted({name.rsplit(".", 1)[-1] for name in names})
        remedy = f"The layers that get factors are: {', '.join(short)}."
        given = [f"{pattern}={config.rank_pattern[pattern]}" for pattern in unused]
        rule = "matches no layer that gets factors"
        raise UserError(Fault("--rank-pattern", shown, rule, remedy) for shown in given)
    own = {name: [r for pattern, r in config.rank_pattern.items() if _matches(name, pattern)] for name in names}
    return {name: found[0] if found else config.r for name, found in own.items()}


def inject(
    model: PreTrainedModel, config: AdapterConfig, task: str = GENERATION, *, originals: nn.Module | None = None
) -> PeftModel:
    """Put trainable factors in `adapter_dtype` on the frozen `model`, with the values that `config` says they begin at.

    By default A is random by torch's seed and B zero. `originals` is the base before it was quantized, for LoftQ.

    The head that `task` puts on a model trains in full, in its own dtype, and is saved with the factors.
    Raises `UserError` for targets that match nothing and for combinations that the libraries cannot train.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from qlora_kit.new_head import head_names

    if config.dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        rule = "does not work on 8-bit layers on a CPU (PEFT's DoRA loses their scales at the second step)"
        raise UserError.of("--dora", True, rule, "Use --bits 4 or 16, or a CUDA device.")
    targets = choose_targets(model, config.targets, config.blocks)
    chosen = {name: m for name, m in linear_layers(model).items() if any(_matches(name, t) for t in targets)}
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
        modules_to_save=(head_names(model) or None) if TASK_MODELS[task].has_new_head else None,
        task_type=TASK_MODELS[task].peft_type,
    )
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    try:
        peft_model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        rule = f"PEFT puts no factors there on a {model.config.model_type} model ({str(error).rstrip('.')})"
        remedy = f"Choose among --targets {','.join(names)}." if names else "The model has no linear layer in a block."
        raise UserError.of("--targets", ",".join(targets), rule, remedy) from None
    _pass_all_inputs(peft_model)
    dtype = torch.bfloat16 if config.adapter_dtype == "bf16" else torch.float32
    for _, parameter in adapter_parameters(peft_model):
        parameter.data = parameter.data.to(dtype)
    initialization.start(peft_model, config, originals)
    return peft_model


def _pass_all_inputs(model: PeftModel) -> None:
    """Let the base get all that `model` is called with: PEFT drops token types and positions when it answers questions.

    (`PeftModelForQuestionAnswering.forward` names them, and passes them on to prompts alone.)
    """
    from peft import PeftModel, PeftModelForQuestionAnswering

    if isinstance(model, PeftModelForQuestionAnswering):
        model.forward = MethodType(PeftModel.forward, model)


def trainable(model: nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that train, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def check_first_gradients(named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Check the gradients of the first step: all there and finite, and those of every B non-zero.

    (Those of A are zero while B is.) Raises `UserError` naming the factors at fault.
    """
    faults = []
    for name, parameter in named:
        if parameter.grad is None:
            faults.append((name, "gets no gradient"))
        elif not bool(parameter.grad.isfinite().all()):
            faults.append((name, "gets a gradient that is not finite"))
        elif "lora_B" in name and not bool(parameter.grad.any()):
            faults.append((name, "gets a gradient of zero"))
    if faults:
        remedy = "Look at the data with `qlora-kit preview`, and try --adapter-dtype fp32 or another --targets."
        raise UserError(Fault(name, "gradient at step 1", rule, remedy) for name, rule in faults)


def save_adapter(model: PeftModel, folder: Path, trained: bool = True) -> None:
    """Save in PEFT's format, then reopen the files and check them against the live factors.

    Beside it go the parts of factors that are made of some (see `factor_parts`), for who resumes; no other needs them.

    Raises `RuntimeError` where the files differ from the factors or (once trained) a factor is all zero.
    """
    from qlora_kit import factor_parts

    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run writes its own card
    factor_parts.save_parts(model, folder)
    check_saved(model, folder, trained)


def check_saved(model: PeftModel, folder: Path, trained: bool = True) -> None:
    """Check that the files in `folder` hold exactly the factors of `model`; raises `RuntimeError` with all faults."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from qlora_kit import factor_parts

    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(folder / WEIGHTS_FILE)
    faults = [f"{key}: missing from the file" for key in live.keys() - saved.keys()]
    faults += [f"{key}: in the file only" for key in saved.keys() - live.keys()]
    for key in live.keys() & saved.keys():
        faults += [f"{key}: {what}" for what in _differences(live[key], saved[key], trained)]
    faults += factor_parts.differences(model, folder)
    if faults:
        raise RuntimeError(f"the adapter saved in {folder} is not right:\n  " + "\n  ".join(sorted(faults)))


def _differences(live: torch.Tensor, saved: torch.Tensor, trained: bool) -> list[str]:
    import torch

    if live.shape != saved.shape or live.dtype != saved.dtype:
        return [f"{tuple(saved.shape)} {saved.dtype} for {tuple(live.shape)} {live.dtype}"]
    if not torch.equal(live.detach().cpu(), saved):
        return ["its values differ (or are not numbers)"]
    return ["all zero after training"] if trained and not saved.any() else []


def load_adapter(model: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """The adapter in `folder` on the base `model`, its dtypes as saved.

    Raises `UserError` where the folder holds no adapter, or one for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError.of("--adapter", str(folder), f"has no {name}", "Give the adapter/ folder of a run.")
    try:
        peft_model = PeftModel.from_pretrained(
            model, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False
        )
        _pass_all_inputs(peft_model)
        load_factors(peft_model, folder)
    except (SafetensorError, OSError) as error:
        rule = f"cannot be read ({str(error).splitlines()[0]})"
        raise UserError.of("--adapter", str(folder), rule, "Copy or train it again.") from None
    except (ValueError, RuntimeError) as error:
        raise UserError.of(
            "--adapter",
            str(folder),
            f"does not fit this base ({str(error).splitlines()[0]})",
            "Give the base it was trained on.",
        ) from None
    return peft_model


def load_factors(model: PeftModel, folder: Path) -> None:
    """Give the live factors of `model` the values and dtypes of the file, exactly.

    PEFT's own loading casts 16-bit factors to fp32, which would change a resumed run.
    Raises `RuntimeError` where keys or shapes differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from qlora_kit import factor_parts

    saved = load_file(folder / WEIGHTS_FILE)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    # an adapter made elsewhere may hold embeddings of the base too
    places = {**dict(model.named_parameters(remove_duplicate=False)), **live}
    wrong = sorted(live.keys() - saved.keys())
    wrong += sorted(k for k in saved if k not in places or places[k].shape != saved[k].shape)
    if wrong:
        raise RuntimeError(f"{folder / WEIGHTS_FILE} does not fit the adapter: {', '.join(wrong)}")
    dtype = next((value.dtype for key, value in saved.items() if "lora_" in key), None)
    parts = {id(part) for _, part in factor_parts.hidden_parts(model)}  # these have dtypes of their own
    for parameter in (p for _, p in adapter_parameters(model) if id(p) not in parts):
        parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, saved)
    factor_parts.load_parts(model, folder)


def adapter_parameters(model: PeftModel) -> list[tuple[str, Any]]:
    """Every parameter of the factors, trainable or not, with its name; those of a head are not among them."""
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]
