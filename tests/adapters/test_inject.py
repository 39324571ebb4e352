from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.files import check_saved, load_adapter, load_factors, save_adapter
from qlora_kit.adapters.inject import adapter_parameters, check_first_gradients, inject, trainable
from qlora_kit.adapters.targets import _ranges, choose_targets, linear_layers, ranks_of
from qlora_kit.config.settings import AdapterConfig, BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model.load import load_base

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)


def base(folder, bits=4):
    return load_base(BaseConfig(model=str(folder), bits=bits), CPU)


def trained(folder, bits=4, **settings):
    """An adapter on the base in `folder`, its factors moved by two steps along the gradient."""
    torch.manual_seed(0)
    model = inject(base(folder, bits), AdapterConfig(**settings))
    model.train()
    for step in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        if step == 0:
            check_first_gradients(trainable(model))
        with torch.no_grad():
            for _, parameter in trainable(model):
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_train_save_reload_gives_the_live_logits(tmp_path, family):
    folder = save_tiny(tmp_path / "base", family)
    model = trained(folder)
    save_adapter(model, tmp_path / "adapter")
    assert not torch.equal(logits(model), logits(base(folder)))
    assert torch.equal(logits(load_adapter(base(folder), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings", [{"dora": True}, {"rslora": True}, {"adapter_dtype": "fp32"}, {"alpha": 3.0, "r": 2}]
)
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_every_kind_of_adapter_reloads_at_every_number_of_bits(tmp_path, family, settings, bits):
    folder = save_tiny(tmp_path / "base", family)
    if "dora" in settings and bits == 8:
        with pytest.raises(UserError, match="dora = True"):
            trained(folder, bits, **settings)
        return
    model = trained(folder, bits, **settings)
    save_adapter(model, tmp_path / "adapter")
    reloaded = load_adapter(base(folder, bits), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), logits(model))
    assert {p.dtype for _, p in adapter_parameters(reloaded)} == {p.dtype for _, p in trainable(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_the_adapter(tmp_path, family):
    folder = save_tiny(tmp_path / "base", family)
    model = trained(folder, bits=32, adapter_dtype="fp32")
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(stock), logits(model))


def test_an_adapter_trained_at_four_bits_on_gpt2_loads_on_the_sixteen_bit_base(tmp_path):
    """Trap 17: such an adapter carries fan_in_fan_out = false, and PEFT must flip it for Conv1D."""
    folder = save_tiny(tmp_path / "base", "gpt2")
    model = trained(folder)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        other = load_adapter(base(folder, 16), tmp_path / "adapter")
    merged_delta = other.base_model.model.transformer.h[0].attn.c_attn.get_delta_weight("default")
    assert merged_delta.shape == (64, 192)  # in × out, as Conv1D stores it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 32])
def test_default_targets_are_every_linear_layer_in_the_blocks_and_never_the_head(tmp_path, family, bits):
    model = base(save_tiny(tmp_path, family), bits)
    layers = linear_layers(model)
    injected = inject(model, AdapterConfig(r=2))
    with_factors = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in trainable(injected)
        if "lora_A" in name
    }
    assert with_factors == set(layers)
    assert not any("head" in name or "embed_out" in name for name in layers)
    assert len(layers) % 2 == 0  # two blocks


def test_targets_may_be_named(tmp_path):
    model = base(save_tiny(tmp_path, "llama"))
    assert choose_targets(model, ("q_proj", "layers.1.mlp.up_proj")) == ["q_proj", "layers.1.mlp.up_proj"]


def test_targets_that_match_nothing_are_all_listed_with_what_there_is(tmp_path):
    model = base(save_tiny(tmp_path, "llama"))
    with pytest.raises(UserError, match=r"This model has: down_proj, gate_proj, k_proj") as caught:
        choose_targets(model, ("q_porj", "q_proj", "lm_haed"))
    assert [fault.value for fault in caught.value.faults] == ["q_porj", "lm_haed"]


def ranks_with_factors(model):
    """The rank and scaling of every layer that has factors."""
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 32])
def test_blocks_may_be_chosen(tmp_path, family, bits):
    folder = save_tiny(tmp_path / "base", family)
    wanted = {name for name in linear_layers(base(folder, bits)) if ".1." in name}
    model = trained(folder, bits, layers="1", adapter_dtype="fp32")
    assert set(ranks_with_factors(model)) == wanted != set()
    assert set(ranks_with_factors(inject(base(folder, bits), AdapterConfig(layers="0-1")))) > wanted
    save_adapter(model, tmp_path / "adapter")
    reloaded = load_adapter(base(folder, bits), tmp_path / "adapter")
    assert set(ranks_with_factors(reloaded)) == wanted
    assert torch.equal(logits(reloaded), logits(model))


@given(st.frozensets(st.integers(0, 60), min_size=1, max_size=12))
def test_any_blocks_can_be_written_as_ranges(numbers):
    assert AdapterConfig(layers=_ranges(numbers)).blocks == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "1,,2", "-1", "1.5", "0..3"])
def test_blocks_that_are_no_numbers_are_refused(text):
    with pytest.raises(UserError, match=r"layers .*ranges, like 0-11"):
        AdapterConfig(layers=text)


def test_blocks_that_the_model_has_not_are_named(tmp_path):
    model = base(save_tiny(tmp_path, "llama"))
    with pytest.raises(UserError, match="layers = '1-4,9': names blocks that the model does not have: 2-4,9") as caught:
        inject(model, AdapterConfig(layers="1-4,9"))
    assert caught.value.faults[0].remedy == "It has 0-1."
    with pytest.raises(UserError, match=r"targets = 'layers.0.mlp.up_proj': has no layer in the blocks 1"):
        inject(model, AdapterConfig(layers="1", targets=("layers.0.mlp.up_proj",)))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_first_rank_that_fits_counts_and_the_scaling_stays(tmp_path, rslora, alpha):
    pattern = {"layers.1.mlp.up_proj": 3, "up_proj": 8, "q_proj": 1}
    folder = save_tiny(tmp_path / "base", "llama")
    model = trained(folder, 32, r=4, alpha=alpha, rslora=rslora, rank_pattern=pattern, adapter_dtype="fp32")
    found = ranks_with_factors(model)
    expected = {name: 3 if name.endswith("1.mlp.up_proj") else 8 if "up_proj" in name else 4 for name in found}
    expected |= {name: 1 for name in found if "q_proj" in name}
    assert (
        {name: rank for name, (rank, _) in found.items()}
        == expected
        == ranks_of(found, AdapterConfig(r=4, rank_pattern=pattern))
    )
    scaling = (8 if alpha is None else alpha) / (4**0.5 if rslora else 4)
    assert all(own == pytest.approx(scaling, rel=1e-12) for _, own in found.values())
    save_adapter(model, tmp_path / "adapter")
    reloaded = load_adapter(base(folder, 32), tmp_path / "adapter")
    assert ranks_with_factors(reloaded) == found
    assert torch.equal(logits(reloaded), logits(model))


def test_ranks_for_layers_that_get_no_factors_are_all_named(tmp_path):
    model = base(save_tiny(tmp_path, "llama"))
    pattern = {"q_porj": 8, "v_proj": 2, "down_proj": 4}
    with pytest.raises(UserError) as caught:
        inject(model, AdapterConfig(targets=("q_proj", "v_proj"), rank_pattern=pattern))
    assert [fault.value for fault in caught.value.faults] == ["q_porj=8", "down_proj=4"]
    assert caught.value.faults[0].remedy == "The layers that get factors are: q_proj, v_proj."


@pytest.mark.parametrize("pattern", [{"q_proj": 0}, {"q proj": 2}, {"(q|v)_proj": 2}, {"": 2}])
def test_ranks_that_break_the_rule_are_refused(pattern):
    with pytest.raises(UserError, match="rank_pattern = "):
        AdapterConfig(rank_pattern=pattern)


def test_the_factors_have_the_dtype_asked_for_and_only_they_train(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = inject(base(folder), AdapterConfig(adapter_dtype=name))
        assert {p.dtype for _, p in trainable(model)} == {dtype}
        assert all("lora_" in name for name, _ in trainable(model))
        b_factors = [p for n, p in trainable(model) if "lora_B" in n]
        assert not any(p.any() for p in b_factors)


def test_the_first_gradients_are_checked(tmp_path):
    model = inject(base(save_tiny(tmp_path, "llama")), AdapterConfig(r=2))
    with pytest.raises(UserError, match="gets no gradient"):
        check_first_gradients(trainable(model))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    check_first_gradients(trainable(model))
    (name, first), (_, second) = [(n, p) for n, p in trainable(model) if "lora_B" in n][:2]
    first.grad.zero_()
    second.grad[0, 0] = float("nan")
    with pytest.raises(UserError) as caught:
        check_first_gradients(trainable(model))
    assert [fault.rule for fault in caught.value.faults] == [
        "gets a gradient of zero",
        "gets a gradient that is not finite",
    ]
    assert caught.value.faults[0].setting == name


@pytest.mark.parametrize("damage", ["missing", "extra", "changed", "zero"])
def test_a_saved_adapter_that_differs_is_found(tmp_path, damage):
    model = trained(save_tiny(tmp_path / "base", "llama"))
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[1]
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["stray"] = torch.ones(1)
    elif damage == "changed":
        tensors[key] = tensors[key] + 1
    else:
        with torch.no_grad():
            trainable(model)[1][1].zero_()
        save_adapter(model, tmp_path / "a", trained=False)
        tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match="is wrong"):
        check_saved(model, tmp_path / "a")


def test_loading_keeps_sixteen_bits_exactly(tmp_path):
    """PEFT's own loading casts bf16 factors to fp32, which would change a resumed run."""
    folder = save_tiny(tmp_path / "base", "gpt2")
    model = trained(folder)
    save_adapter(model, tmp_path / "a")
    fresh = inject(base(folder), AdapterConfig())
    load_factors(fresh, tmp_path / "a")
    live = dict(trainable(model))
    assert all(torch.equal(p, live[n]) and p.dtype == torch.bfloat16 for n, p in trainable(fresh))


def test_an_adapter_of_another_rank_or_model_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    save_adapter(trained(folder, r=4), tmp_path / "a")
    with pytest.raises(RuntimeError, match="does not fit"):
        load_factors(inject(base(folder), AdapterConfig(r=8)), tmp_path / "a")
    other = save_tiny(tmp_path / "other", "gpt2")
    with pytest.raises(UserError, match="adapter = "):
        load_adapter(base(other), tmp_path / "a")
    with pytest.raises(UserError, match="has no adapter_config"):
        load_adapter(base(folder), tmp_path)
