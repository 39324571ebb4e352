"""Factors made of parts, on real PEFT models: what trains, what is saved, and what the lean step makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from families import save_tiny, tiny_model
from lean_cases import LEAN, assert_within_stock_error, batch, exact_step, take_step, with_factors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.files import check_saved, load_adapter, load_factors, save_adapter
from qlora_kit.adapters.inject import adapter_parameters, inject, trainable
from qlora_kit.adapters.parts import PARTS_FILE, CoreFactor, HalfFrozen, PartedFactor, hidden_parts
from qlora_kit.config.settings import AdapterConfig, BaseConfig
from qlora_kit.lean.apply import make_lean
from qlora_kit.model.load import load_base
from qlora_kit.model.quantize import count_parameters

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)
KINDS = {
    "pissa": {"init": "pissa", "adapter_dtype": "fp32"},
    "olora": {"init": "olora", "adapter_dtype": "fp32"},
    "lora-xs": {"variant": "lora-xs"},
    "lora-xs fp32": {"variant": "lora-xs", "adapter_dtype": "fp32"},
}
DTYPES = {"pissa": torch.float32, "olora": torch.float32, "lora-xs": torch.bfloat16, "lora-xs fp32": torch.float32}


def base(folder, bits=4):
    return load_base(BaseConfig(model=str(folder), bits=bits), CPU)


def injected(folder, bits, kind, **settings):
    torch.manual_seed(0)
    return inject(base(folder, bits), AdapterConfig(**{"r": 4, **KINDS[kind], **settings}))


def trained(folder, bits, kind, **settings):
    """An adapter moved by two steps along its gradient."""
    model = injected(folder, bits, kind, **settings).train()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for _, parameter in trainable(model):
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_tiny(tmp_path_factory.mktemp(family), family) for family in ("gpt2", "llama")}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_again_is_what_was_trained(folders, tmp_path, family, bits, kind):
    """The files are plain LoRA, and answer as the live model does, bit for bit."""
    model = trained(folders[family], bits, kind)
    assert not torch.equal(logits(model), logits(base(folders[family], bits)))
    save_adapter(model, tmp_path)
    reloaded = load_adapter(base(folders[family], bits), tmp_path)
    assert not any(isinstance(module, PartedFactor) for module in reloaded.modules())
    assert {p.dtype for _, p in adapter_parameters(reloaded)} == {DTYPES[kind]}
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_who_goes_on_training_gets_every_part_back(folders, tmp_path, bits, kind):
    model = trained(folders["llama"], bits, kind)
    save_adapter(model, tmp_path)
    other = injected(folders["llama"], bits, kind)
    load_factors(other, tmp_path)
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts = [*adapter_parameters(other), *((n, b) for n, b in other.named_buffers() if "lora_" in n)]
    assert len(parts) == 2 * 14 * (2 if "xs" not in kind else 1.5)
    assert all(torch.equal(part, live[name]) and part.dtype == live[name].dtype for name, part in parts)
    assert [name for name, _ in trainable(other)] == [name for name, _ in trainable(model)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["pissa", "lora-xs fp32"])
def test_stock_peft_loads_it(folders, tmp_path, family, kind):
    model = trained(folders[family], 32, kind)
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[family]), str(tmp_path))
    torch.testing.assert_close(logits(stock), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_switching_the_adapter_off_and_on_lets_nothing_train_that_did_not(folders, kind):
    model = injected(folders["llama"], 4, kind)
    before = [name for name, _ in trainable(model)]
    assert before
    with model.disable_adapter():
        assert trainable(model) == []
    assert [name for name, _ in trainable(model)] == before
    model.set_adapter("default")
    assert [name for name, _ in trainable(model)] == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("pissa", torch.float32), ("lora-xs", torch.float32), ("lora-xs", torch.bfloat16)]
)
def test_the_lean_step_is_that_of_stock_peft(family, kind, dtype):
    stock = with_factors(tiny_model(family, dtype=dtype), **KINDS[kind])
    with torch.no_grad():
        for module in stock.modules():
            if isinstance(module, CoreFactor):  # drawn for factors, not for a core between two
                module.core.mul_(0.1)
    lean = copy.deepcopy(stock)
    outcomes = make_lean(lean, LEAN)
    assert outcomes["factors first"].left == ""
    inputs = batch()
    assert_within_stock_error(
        take_step(lean, inputs), take_step(copy.deepcopy(stock), inputs), exact_step(stock, inputs)
    )


def test_of_lora_xs_less_than_a_hundredth_of_loras_parameters_trains(tmp_path):
    """Checked on the shape of a real model: gpt2-large, r = 16."""
    config = BaseConfig(model="gpt2-large", weights="random")
    counts = {}
    for variant in ("lora", "lora-xs"):
        with torch.device("meta"):
            model = inject(load_base(config, torch.device("meta")), AdapterConfig(r=16, variant=variant))
        counts[variant] = count_parameters(model).trainable
    assert counts["lora-xs"] == 36 * 4 * 16 * 16
    assert counts["lora-xs"] < 0.01 * counts["lora"]


def test_the_core_is_fp32_and_keeps_steps_that_bf16_would_lose(folders):
    model = injected(folders["llama"], 4, "lora-xs")
    cores = [m.core for m in model.modules() if isinstance(m, CoreFactor)]
    assert {core.dtype for core in cores} == {torch.float32}
    assert all(p is core for (_, p), core in zip(trainable(model), cores, strict=True))


@pytest.mark.parametrize("damage", ["missing", "changed", "other"])
def test_parts_that_are_not_right_are_found(folders, tmp_path, damage):
    model = trained(folders["llama"], 4, "lora-xs")
    save_adapter(model, tmp_path)
    file = tmp_path / PARTS_FILE
    saved = load_file(file)
    name = next(name for name in saved if name.endswith(".core"))
    if damage == "missing":
        file.unlink()
    else:
        core = saved.pop(name)
        save_file({**saved, (name if damage == "changed" else "stray"): core + 1}, file)
    with pytest.raises((RuntimeError, OSError), match=r"is wrong|No such file"):
        check_saved(model, tmp_path)
    if damage != "changed":
        with pytest.raises((RuntimeError, OSError), match=r"does not fit|No such file"):
            load_factors(injected(folders["llama"], 4, "lora-xs"), tmp_path)


def test_plain_factors_leave_no_file_of_parts(folders, tmp_path):
    save_adapter(trained(folders["llama"], 4, "pissa"), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_halves_of_another_rank_do_not_fit(folders, tmp_path):
    model = trained(folders["llama"], 4, "pissa")
    assert sum(isinstance(module, HalfFrozen) for module in model.modules()) == 2 * 14
    assert list(hidden_parts(model)) == []
    save_adapter(model, tmp_path)
    with pytest.raises(RuntimeError, match="does not fit"):
        load_factors(injected(folders["llama"], 4, "pissa", r=8), tmp_path)
