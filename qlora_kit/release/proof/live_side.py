"""The live model, as it trained and with its weights dequantized: what a release is compared with.

Run in a process of its own by `verify`: `python -m qlora_kit.release.proof.live_side JOB`, where JOB is a JSON file.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import files
from qlora_kit.config.files import read_settings
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.model import load
from qlora_kit.model.quantize import dense_weight
from qlora_kit.release.quantize import PackedWeight, Quantization, dequantized
from qlora_kit.system import host_memory, quiet
from qlora_kit.system.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora_kit.release.proof.rows import ProofQuestions

ROWS_FILE, LIVE_FILE, ERROR_FILE = "rows.json", "live.json", "error.json"
LIVE = "live"


@dataclass(frozen=True, kw_only=True)
class LiveJob:
    """What the live side of a proof is told; plain values, for it travels as JSON."""

    config: dict[str, Any]  # the settings of a `RunConfig`
    seen_dtype: str
    adapters: list[tuple[str, float]]
    bases: list[str]  # what was merged into: "trained", "original" or both
    dtype: str  # of the release, as torch calls it
    pack: dict[str, Any] | None  # the fields of a `Quantization`
    packed_names: list[str]
    token_budget: int
    data_use: str  # one of `rows.DATA_USES`
    out: str  # the folder to write to


def load_literally(config: BaseConfig, dtype: torch.dtype, chosen: Sequence[tuple[str, float]]) -> Any:
    """The model as it trained: the quantized base with its adapters, in evaluation mode on the CPU."""
    import torch

    model = load.load_base(config, torch.device("cpu"), dtype=dtype)
    return put_on(model, chosen)


def put_on(model: Any, chosen: Sequence[tuple[str, float]]) -> Any:
    """The base `model` with all the adapters in `chosen` at work, each with its weight; without any, as it is."""
    if not chosen:
        return model.eval()
    (first, weight), *others = chosen
    with warnings.catch_warnings():
        # on unquantized GPT-2 PEFT turns the setting the right way round, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        peft_model = files.load_adapter(model, Path(first))
        names = ["default"]
        for number, (folder, _) in enumerate(others, 1):
            names.append(f"adapter_{number}")
            peft_model.load_adapter(folder, adapter_name=names[-1], autocast_adapter_dtype=False)
    if others:
        peft_model.base_model.set_adapter(names)
    for name, share in zip(names, [weight, *(share for _, share in others)], strict=True):
        if share != 1.0:
            _scale(peft_model, name, share)
    return peft_model.eval()


def _scale(peft_model: Any, name: str, share: float) -> None:
    """Give one adapter a share of its strength: its factors' scaling, and what it holds whole."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for module in peft_model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= share
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            originals = module.original_module.parameters()
            for own, original in zip(module.modules_to_save[name].parameters(), originals, strict=True):
                own.data = torch.lerp(original.data.float(), own.data.float(), share).to(own.dtype)


def take_off(peft_model: Any) -> Any:
    """The base as it was without its adapters; PEFT's `unload` alone would keep the tensors that they hold whole."""
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(peft_model, PeftModel):
        return peft_model
    for module in peft_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return peft_model.unload()


def widen(model: Any) -> Any:
    """Replace every quantized layer by a plain one with the weights it computes with, and take all to fp32, in place.

    The live quantized weights are dequantized by bitsandbytes into the dtype that their layer uses, so the model has
    the same weights as before and only its arithmetic is exact.
    """
    from torch import nn

    for name, module in list(model.named_modules()):
        if type(module).__module__.startswith("bitsandbytes."):
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            layer.weight = nn.Parameter(dense_weight(module).float(), requires_grad=False)
            layer.bias = module.bias
            model.set_submodule(name, layer)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        setattr(model, flag, False)
    model.hf_quantizer = None
    return _all_in_fp32(model)


def _all_in_fp32(model: nn.Module) -> nn.Module:
    """Cast every floating parameter and buffer, one at a time.

    Sines as positions (Marian's, Pegasus') are in no file: whoever loads a model computes them, in the dtype of that.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    for buffer in model.buffers():
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
    for module in load.computed_modules(model):
        module.weight.data = module.create_weight()
    return model


def round_weights(model: Any, dtype: torch.dtype, pack: Quantization | None, packed_names: Iterable[str]) -> None:
    """Round every weight and saved buffer of a merged fp32 model as the release does, in place."""
    import torch
    from transformers.pytorch_utils import Conv1D

    packed = set(packed_names)
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if pack is not None and name in packed:
            weight = parameter.data.T.contiguous() if name in turned else parameter.data
            pieces = dequantized(PackedWeight.of(weight.to(dtype), dtype, pack))
            dense = torch.cat([rows for _, rows in pieces])
            parameter.data = dense.T.contiguous() if name in turned else dense
        else:
            parameter.data = parameter.data.to(dtype).float()
    saved = model.state_dict(keep_vars=True).keys()  # buffers in no file are computed by whoever loads the model
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype).float()


def main(job: LiveJob) -> None:
    """Answer the questions with the live model in its own arithmetic and in fp32, and with its weights rounded.

    Writes into the folder `job.out`: first the questions, then the logits as `literal`, `live` and, to compare a
    merge into the original base with, `original`, each rounded as `rounded-…`; last of all `live.json`.
    """
    quiet.quiet_libraries()
    quiet.quiet_progress_bars()
    with host_memory.building():  # it asks few questions, and makes each weight again and again
        _answer(job)


def _answer(job: LiveJob) -> None:
    import torch

    from qlora_kit.release.proof.rows import ask

    config = RunConfig.from_flat(read_settings({"settings": job.config}))
    answers = _Answers(ask(config, job.data_use, job.token_budget), Path(job.out))
    model: Any = load_literally(config.base, getattr(torch, job.seen_dtype), job.adapters)
    answers.of(model, "literal")
    model = _all_in_fp32(put_on(widen(take_off(model)), job.adapters))
    answers.of(model, LIVE)
    if "trained" in job.bases:
        answers.of_rounded(model, "trained", job)
    if "original" in job.bases:
        del model
        as_it_was = BaseConfig(**{**asdict(config.base), "bits": 32})
        model = _all_in_fp32(load_literally(as_it_was, torch.float32, job.adapters))
        answers.of(model, "original")
        answers.of_rounded(model, "original", job)
    write_json(Path(job.out) / LIVE_FILE, answers.found)


class _Answers:
    """Asks models the same questions, and keeps what they say in files."""

    def __init__(self, asked: ProofQuestions, out: Path) -> None:
        self.asked, self.out = asked, out
        self.found: dict[str, Any] = {}
        write_json(out / ROWS_FILE, asked.to_dict())

    def of(self, model: Any, name: str) -> None:
        from safetensors.torch import save_file

        from qlora_kit.release.proof import release_side

        asked = self.asked.to_dict()
        save_file(release_side.row_logits(model, asked), self.out / f"{name}.safetensors")
        self.found[name] = release_side.answer(model, asked)

    def of_rounded(self, model: Any, name: str, job: LiveJob) -> None:
        """The same with the weights of `model` merged and rounded as in the release; nothing for one in fp32."""
        import torch

        dtype = getattr(torch, job.dtype)
        if dtype != torch.float32 or job.pack is not None:
            merged = model.merge_and_unload() if job.adapters else model
            round_weights(merged, dtype, Quantization(**job.pack) if job.pack else None, job.packed_names)
            self.of(merged, f"rounded-{name}")


def run(job_file: Path) -> None:
    """`main` on the job in a file; what a user can mend is written down for the process that waits."""
    job = LiveJob(**json.loads(job_file.read_text(encoding="utf-8")))
    try:
        main(job)
    except UserError as error:
        faults = [[fault.setting, fault.value, fault.rule, fault.remedy] for fault in error.faults]
        write_json(Path(job.out) / ERROR_FILE, {"faults": json.loads(json.dumps(faults, default=str))})
        sys.exit(2)


if __name__ == "__main__":
    from qlora_kit.release.proof.watch_parent import end_with_parent

    end_with_parent()
    run(Path(sys.argv[1]))
