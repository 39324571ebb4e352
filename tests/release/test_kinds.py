"""Releases of every kind of adapter and base, against stock PEFT on the weights of the live base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import save_tiny
from releases import (
    check_release,
    difference,
    expected_model,
    live_weights,
    logits_of,
    make_adapter,
    release,
    stock,
)
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model.load import load_base

SOME = ["gpt2", "llama", "qwen2"]  # Conv1D and tied; grouped-query and untied; biases and tied


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The folder of a family's tiny base, made once."""
    made: dict[str, Path] = {}

    def base_of(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp("base") / family, family)
        return made[family]

    return base_of


@pytest.mark.parametrize("family", SOME)
def test_the_releases_weights_are_the_live_ones_bit_for_bit_where_no_adapter_is(bases, tmp_path, family):
    """Also those of layers that are quantized and carry no factors: they are what the adapter saw of them."""
    target = {"gpt2": "c_attn", "llama": "v_proj", "qwen2": "v_proj"}[family]
    adapter = make_adapter(bases(family), tmp_path / "adapter", target_modules=[target])
    live = live_weights(load_base(BaseConfig(model=str(bases(family))), torch.device("cpu")))
    released = stock(release(bases(family), [(adapter, 1.0)], tmp_path / "out").folder)
    for name, parameter in released.named_parameters():
        turned = type(released.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and name.endswith("weight")
        same = torch.equal(parameter.T.float() if turned else parameter.float(), live[name])
        assert same == (target not in name or name.endswith("bias")), name


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", SOME)
def test_into_the_original_base(bases, tmp_path, family, bits):
    adapter = make_adapter(bases(family), tmp_path / "adapter", bits)
    check_release(bases(family), [(adapter, 1.0)], tmp_path / "out", bits, into="original")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"c_attn": 8, r"h\.1\.mlp\.c_fc": 2}, "alpha_pattern": {"c_attn": 3, "attn.c_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"c_fc": 2}},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["ln_f"]},
    ],
    ids=str,
)
def test_every_kind_of_adapter_on_conv1d(bases, tmp_path, settings):
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter", **settings)
    check_release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "bits", "settings"),
    [
        ("llama", 4, {"use_dora": True}),
        ("llama", 16, {"use_dora": True, "use_rslora": True}),
        ("llama", 4, {"modules_to_save": ["lm_head"]}),
        ("llama", 16, {"modules_to_save": ["embed_tokens", "norm"]}),
        ("llama", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("qwen2", 4, {"bias": "lora_only"}),
        ("qwen2", 8, {"bias": "all"}),
        ("qwen2", 8, {"target_modules": r".*\.1\..*\.(q_proj|up_proj)"}),
        ("gpt2", 16, {"use_dora": True, "fan_in_fan_out": True}),
        ("opt", 4, {"target_modules": ["fc1"], "layers_to_transform": [1]}),
    ],
    ids=str,
)
def test_every_kind_of_adapter_on_other_layers(bases, tmp_path, family, bits, settings):
    adapter = make_adapter(bases(family), tmp_path / "adapter", bits, **settings)
    check_release(bases(family), [(adapter, 1.0)], tmp_path / "out", bits)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["wte"]}], ids=str)
def test_a_head_that_was_trained_apart_from_its_embedding_is_untied(bases, tmp_path, settings):
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter", **settings)
    model = check_release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


@pytest.mark.parametrize(("family", "target"), [("gpt2", "wte"), ("qwen2", "lm_head")])
def test_factors_on_one_of_two_tied_layers_untie_them(bases, tmp_path, family, target):
    inner = {"gpt2": "c_attn", "qwen2": "q_proj"}[family]
    adapter = make_adapter(bases(family), tmp_path / "adapter", target_modules=[inner, target])
    model = check_release(bases(family), [(adapter, 1.0)], tmp_path / "out")
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize(("family", "bits"), [("gpt2", 4), ("llama", 8)])
def test_several_adapters_add_up_by_their_weights(bases, tmp_path, family, bits):
    chosen = [
        (make_adapter(bases(family), tmp_path / "a", bits), 0.7),
        (make_adapter(bases(family), tmp_path / "b", bits, seed=1, r=2, use_rslora=True), -0.3),
    ]
    check_release(bases(family), chosen, tmp_path / "out", bits)


def test_an_adapters_weight_scales_all_that_it_changes(bases, tmp_path):
    """So does a tensor that was trained whole: it goes that share of its way."""
    base, adapter = (
        bases("llama"),
        make_adapter(bases("llama"), tmp_path / "a", modules_to_save=["norm"]),
    )
    none = live_weights(load_base(BaseConfig(model=str(base)), torch.device("cpu")))
    whole, half = (
        dict(stock(release(base, [(adapter, share)], tmp_path / str(share), dtype="fp32").folder).named_parameters())
        for share in (1.0, 0.5)
    )
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(whole[name], none[name])
        torch.testing.assert_close(half[name], (whole[name] + none[name]) / 2)


def test_dora_has_no_share(bases, tmp_path):
    adapter = make_adapter(bases("llama"), tmp_path / "a", use_dora=True)
    with pytest.raises(UserError, match=r"cannot have the weight 0.7: its DoRA magnitudes"):
        release(bases("llama"), [(adapter, 0.7)], tmp_path / "out")


def test_trap_2_stock_transformers_loads_a_merged_gpt2(bases, tmp_path):
    """Saved by the stock path after dequantization, square layers load silently transposed, and others not at all."""
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter")
    release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "out", dtype="fp32")
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = expected_model(bases("gpt2"), [(adapter, 1.0)], 4)
    ours, theirs = (m.transformer.h[0].attn.c_proj.weight for m in (model, expected.merge_and_unload()))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, theirs.T, atol=0.1)


def test_trap_3_merging_into_packed_weights_loses_much_and_we_lose_nothing(bases, tmp_path):
    """The stock way adds into the 4-bit weights and quantizes the sum again."""
    from qlora_kit.adapters.files import load_adapter

    base, adapter = bases("gpt2"), make_adapter(bases("gpt2"), tmp_path / "adapter")
    exact = logits_of(expected_model(base, [(adapter, 1.0)], 4))
    model = load_adapter(load_base(BaseConfig(model=str(base)), torch.device("cpu")), adapter)
    with pytest.warns(UserWarning, match="rounding errors"):
        lossy = difference(logits_of(model.merge_and_unload()), exact)
    release(base, [(adapter, 1.0)], tmp_path / "out")
    ours = difference(logits_of(stock(tmp_path / "out").float()), exact)
    assert ours < lossy / 4


def test_trap_17_the_orientation_is_the_layers_not_the_settings(bases, tmp_path):
    """An adapter of a 4-bit GPT-2 says fan_in_fan_out = false, one of a 16-bit GPT-2 true; its factors are the same."""
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is False
    first = load_file(release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "false").folder / "model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": True}))
    second = load_file(release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "true").folder / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def renamed(base: Path, out: Path, rename) -> Path:
    """A copy of a base whose tensors have other names in its file; None leaves one out."""
    out.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {rename(name): value for name, value in load_file(base / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_gpt2_files_without_the_prefix_that_the_model_has(bases, tmp_path, format):
    """The published files are of both kinds, and the release's are of the base's kind."""
    plain = renamed(bases("gpt2"), tmp_path / "plain", lambda name: name.removeprefix("transformer."))
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter")
    if format == "dense":
        check_release(plain, [(adapter, 1.0)], tmp_path / "out")
        assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "out" / "model.safetensors")
    else:
        release(plain, [(adapter, 1.0)], tmp_path / "out", format="nf4")
        stock(tmp_path / "out")


def test_gpt_neox_files_with_the_heads_old_name(bases, tmp_path):
    def old(name: str) -> str:
        return name.replace("lm_head.", "embed_out.")

    base = renamed(bases("gpt_neox"), tmp_path / "old", old)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    check_release(base, [(adapter, 1.0)], tmp_path / "out")


def test_tensors_that_the_model_has_no_use_for_are_left_out_and_named(bases, tmp_path):
    base = renamed(bases("llama"), tmp_path / "more", lambda name: name)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # as old files have it
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(bases("llama"), tmp_path / "adapter")
    result = release(base, [(adapter, 1.0)], tmp_path / "out")
    assert result.report["release"]["left_out"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    stock(result.folder)


def test_a_model_of_which_loading_fuses_weights(tmp_path):
    """Mixtral's experts are apart in the files and one tensor in the model: copied; the attention is merged."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, **shape)
    save_tiny(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    assert any("experts.0.w1" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    check_release(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out")


def test_a_base_in_several_files_and_a_release_in_several(bases, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(bases("llama")).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    for file in bases("llama").glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    monkeypatch.setattr("qlora_kit.release.merge.SHARD_BYTES", 100_000)
    check_release(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in stock(tmp_path / "out").parameters())


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", SOME)
def test_packed_in_nf4_after_the_merge(bases, tmp_path, family, bits):
    """Stock transformers loads it as a bitsandbytes checkpoint; it is the merged weight, quantized once."""
    adapter = make_adapter(bases(family), tmp_path / "adapter", bits)
    release(bases(family), [(adapter, 1.0)], tmp_path / "out", bits, format="nf4")
    packed = live_weights(stock(tmp_path / "out"))
    release(bases(family), [(adapter, 1.0)], tmp_path / "dense", bits)
    expected = live_weights(load_base(BaseConfig(model=str(tmp_path / "dense"), bits=4), torch.device("cpu")))
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in packed)


def test_fp16_that_overflows_is_refused_and_leaves_nothing(bases, tmp_path):
    base = renamed(bases("llama"), tmp_path / "large", lambda name: name)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(bases("llama"), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"dtype = 'fp16': cannot hold model\.norm\.weight, which has weights up to"):
        release(base, [(adapter, 1.0)], tmp_path / "new" / "out", dtype="fp16")
    assert not (tmp_path / "new").exists()


def test_a_change_that_the_dtype_swallows_is_refused(bases, tmp_path):
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", 16, target_modules=["v_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * 1e-4 for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="rounds away everything that the adapter changed"):
        release(bases("llama"), [(adapter, 1.0)], tmp_path / "out", 16)
    release(bases("llama"), [(adapter, 1.0)], tmp_path / "out", 16, dtype="fp32")


@pytest.mark.parametrize("room", [1, 1 << 40])
def test_several_tensors_at_once_give_the_same_file(bases, tmp_path, monkeypatch, room):
    """With room for one at a time, and for all."""
    adapter = make_adapter(bases("gpt2"), tmp_path / "adapter")
    one = release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "one").folder
    monkeypatch.setattr("qlora_kit.release.stream.LARGEST_AT_ONCE", room)
    torch.set_num_threads(3)
    try:
        three = release(bases("gpt2"), [(adapter, 1.0)], tmp_path / "three").folder
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert (one / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()


def test_an_error_in_one_of_several_threads_ends_the_merge(bases, tmp_path):
    base = renamed(bases("llama"), tmp_path / "large", lambda name: name)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", 16)
    torch.set_num_threads(3)
    try:
        with pytest.raises(UserError, match="cannot hold"):
            release(base, [(adapter, 1.0)], tmp_path / "out", 16, dtype="fp16")
    finally:
        torch.set_num_threads(1)
    assert not (tmp_path / "out").exists()
