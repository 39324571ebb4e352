"""Tiny adapters with factors off zero, and what releases of them must answer, worked out without our merge."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from transformers import AutoModelForCausalLM

from qlora_kit import AdapterConfig, DataConfig, OptimConfig, RunConfig, train
from qlora_kit.adapters.targets import choose_targets
from qlora_kit.cli import main
from qlora_kit.cli.merge import make_request
from qlora_kit.config.settings import BaseConfig
from qlora_kit.model.load import load_base
from qlora_kit.release.merge import MergeResult, merge
from qlora_kit.release.request import MergeRequest

CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO())
IDS = (torch.arange(48)[None] * 7) % 250
FACTOR_STD = 0.1
WRONG_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def make_adapter(
    base: Path, out: Path, bits: int = 4, seed: int = 0, save_embedding_layers: bool = False, **settings: Any
) -> Path:
    """An adapter on the base in `bits`, every tensor of it drawn by `seed`, saved by PEFT; gives its folder."""
    model = load_base(BaseConfig(model=str(base), bits=bits), CPU)
    targets = settings.pop("target_modules", None) or choose_targets(model, None)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    for name, value in settings.items():
        setattr(config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=draw) * FACTOR_STD
            near = "lora_A" not in name and "lora_B" not in name and "lora_embedding" not in name
            parameter.data = (parameter.data.float() * (1 + noise) + noise if near else noise).to(parameter.dtype)
        peft_model.save_pretrained(str(out), save_embedding_layers=save_embedding_layers)
    return out


def train_tiny(base: Path, out: Path, **base_settings: Any) -> Path:
    """A finished run of two steps on the base; gives its folder."""
    data = out.parent / f"{out.name}.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(8)))
    config = RunConfig(
        base=BaseConfig(model=str(base), device="cpu", **base_settings),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data=str(data), seq_len=32),
        optim=OptimConfig(lr=2e-2, max_steps=2),
        out=str(out),
        preflight=False,
    )
    train(config, QUIET)
    return out


def asked(*words: object) -> MergeRequest:
    """What `qlora-kit merge` makes of the words after it."""
    given, own = main.read("merge", main.command_of("merge"), [str(word) for word in words])
    return make_request(given, own.pop("run", None), own.pop("adapter", ()), own.pop("base", None), own)


def merged(*words: object) -> MergeResult:
    """`qlora-kit merge` without the proof on the whole model."""
    return merge(asked(*words), QUIET, whole_model=False)


def live_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter of the live model as it computes with it, in fp32; quantized ones (out × in) by bitsandbytes."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "quant_state"):
            value = functional.dequantize_4bit(parameter.data, parameter.quant_state)
        elif parameter.dtype == torch.int8:
            value = functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
        else:
            value = parameter.data
        found[name] = value.float()
    return found


def expected_model(base: Path, adapters: Sequence[tuple[Path, float]], bits: int, original: bool = False) -> Any:
    """The stock fp32 model with the weights of the live base in it, and the adapters on it by stock PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if not original:
        live = live_weights(load_base(BaseConfig(model=str(base), bits=bits), CPU))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_turned = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and bits <= 8
                turned = is_turned and name.endswith(".weight")
                parameter.copy_(live[name].T if turned else live[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(model, str(adapters[0][0]), adapter_name="a0")
        for number, (folder, _) in enumerate(adapters[1:], 1):
            peft_model.load_adapter(str(folder), adapter_name=f"a{number}")
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                for name in module.scaling:
                    module.scaling[name] *= adapters[int(name[1:])][1]
        if len(adapters) > 1:
            peft_model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    return peft_model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of the logits, in units of their spread."""
    return float((found - expected).abs().max() / expected.std())


def release(
    base: Path, adapters: Sequence[tuple[Path, float]], out: Path, bits: int = 4, **settings: Any
) -> MergeResult:
    """Merge without the proof on the whole model, which the tests do themselves."""
    chosen = tuple((str(folder), weight) for folder, weight in adapters)
    request = MergeRequest(base=BaseConfig(model=str(base), bits=bits), adapters=chosen, out=str(out), **settings)
    return merge(request, QUIET, whole_model=False)


def stock(folder: Path) -> Any:
    """The release as stock transformers loads it, its keys checked."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in WRONG_KEYS), info
    return model.eval()


def check_release(base: Path, adapters: Sequence[tuple[Path, float]], out: Path, bits: int = 4, **settings: Any) -> Any:
    """Release in fp32 and compare with what is expected; returns the stock model."""
    release(base, adapters, out, bits, dtype="fp32", **settings)
    model = stock(out)
    expected = expected_model(base, adapters, bits, settings.get("into") == "original")
    assert difference(logits_of(model), logits_of(expected)) < 1e-4
    return model
