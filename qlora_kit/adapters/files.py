"""An adapter's folder, in PEFT's format: saved, checked against what was trained, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel
from qlora_kit.adapters.inject import adapter_parameters, pass_all_inputs

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def save_adapter(model: PeftModel, folder: Path, trained: bool = True) -> None:
    """Save in PEFT's format, then reopen the files and check them against the live factors.

    The parts of factors (see `parts`) are saved beside it; only resuming needs them.

    Raises `RuntimeError` if the files differ from the factors or (once trained) a factor is all zero.
    """
    from qlora_kit.adapters.parts import save_parts

    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run writes its own card
    save_parts(model, folder)
    check_saved(model, folder, trained)


def check_saved(model: PeftModel, folder: Path, trained: bool = True) -> None:
    """Check that the files in `folder` hold exactly the factors of `model`; raises `RuntimeError` with all faults."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from qlora_kit.adapters.parts import differences

    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(folder / WEIGHTS_FILE)
    faults = [f"{key}: missing from the file" for key in live.keys() - saved.keys()]
    faults += [f"{key}: in the file only" for key in saved.keys() - live.keys()]
    for key in live.keys() & saved.keys():
        faults += [f"{key}: {what}" for what in _differences(live[key], saved[key], trained)]
    faults += differences(model, folder)
    if faults:
        raise RuntimeError(f"the adapter saved in {folder} is wrong:\n  " + "\n  ".join(sorted(faults)))


def _differences(live: torch.Tensor, saved: torch.Tensor, trained: bool) -> list[str]:
    import torch

    if live.shape != saved.shape or live.dtype != saved.dtype:
        return [f"{tuple(saved.shape)} {saved.dtype} for {tuple(live.shape)} {live.dtype}"]
    if not torch.equal(live.detach().cpu(), saved):
        return ["its values differ (or are not numbers)"]
    return ["all zero after training"] if trained and not saved.any() else []


def load_adapter(model: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """The adapter in `folder` on the base `model`, its dtypes as saved.

    Raises `UserError` if the folder holds no adapter, or one for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError.of("adapter", str(folder), f"has no {name}", "Give the adapter/ folder of a run.")
    try:
        peft_model = PeftModel.from_pretrained(
            model, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False
        )
        pass_all_inputs(peft_model)
        load_factors(peft_model, folder)
    except (SafetensorError, OSError) as error:
        rule = f"cannot be read ({str(error).splitlines()[0]})"
        raise UserError.of("adapter", str(folder), rule, "Copy it again, or train again.") from None
    except (ValueError, RuntimeError) as error:
        raise UserError.of(
            "adapter",
            str(folder),
            f"does not fit this base ({str(error).splitlines()[0]})",
            "Give the base that it was trained on.",
        ) from None
    return peft_model


def load_factors(model: PeftModel, folder: Path) -> None:
    """Give the live factors of `model` the values and dtypes of the file, exactly.

    PEFT's own loading casts 16-bit factors to fp32, which would change a resumed run.
    Raises `RuntimeError` where keys or shapes differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from qlora_kit.adapters.parts import hidden_parts, load_parts

    saved = load_file(folder / WEIGHTS_FILE)
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    # an adapter made elsewhere may hold embeddings of the base too
    places = {**dict(model.named_parameters(remove_duplicate=False)), **live}
    wrong = sorted(live.keys() - saved.keys())
    wrong += sorted(k for k in saved if k not in places or places[k].shape != saved[k].shape)
    if wrong:
        raise RuntimeError(f"{folder / WEIGHTS_FILE} does not fit the adapter: {', '.join(wrong)}")
    dtype = next((value.dtype for key, value in saved.items() if "lora_" in key), None)
    parts = {id(part) for _, part in hidden_parts(model)}  # these have dtypes of their own
    for parameter in (p for _, p in adapter_parameters(model) if id(p) not in parts):
        parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, saved)
    load_parts(model, folder)
