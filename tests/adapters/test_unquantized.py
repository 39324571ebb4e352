"""What 4 and 8 bits leave in 16: refused where it is much of a model, said where it is allowed."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import classifiers
import pytest
import text_pairs
import torch
from families import FAMILIES, save_tiny, tiny_tokenizer
from refusals import fails
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit import UserError, train
from qlora_kit.adapters import unquantized
from qlora_kit.build import build_model
from qlora_kit.cli.main import main
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.memory.plan import plan
from qlora_kit.model import load
from qlora_kit.runs import messages
from qlora_kit.runs.finished import find_run, load_run_model

CPU, META = torch.device("cpu"), torch.device("meta")
_SIZES = {
    **{"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 256},
}
MIXTURES = {
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **{"head_dim": 16, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


def save_mixture(folder: Path, kind: str = "qwen3_moe") -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_SIZES, **MIXTURES[kind]})
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(8)))
    return file


def settings(model: Path | str, **more: object) -> RunConfig:
    flat = {"model": str(model), "device": "cpu", "seq_len": 32, "max_steps": 1, "batch_size": 2, "r": 2}
    return RunConfig.from_flat({**flat, **more})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_refused_before_its_weights_are_loaded(tmp_path, kind, bits, monkeypatch):
    folder = save_mixture(tmp_path, kind)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    stacked = sum(p.numel() for n, p in whole.named_parameters() if p.ndim == 3)
    monkeypatch.setattr(load, "_load_pretrained", None)
    with pytest.raises(UserError, match=f"^bits = {bits}: would leave") as caught:
        build_model(settings(folder, bits=bits), CPU)
    found = unquantized.find(whole)
    assert stacked <= found.weights < 1.05 * stacked  # a router, and the biases of experts, are few
    assert found.said in str(caught.value)
    assert found.example.endswith("mlp.experts.gate_up_proj")
    assert "none of them gets factors to train" in str(caught.value)
    assert "allow_16_bit_experts=True" in str(caught.value)


def test_what_stays_is_what_the_quantized_model_holds_in_16_bits(mixture):
    """Of the real model, with its quantized layers and factors, as much as was foreseen without weights."""
    config = settings(mixture, bits=4, allow_16_bit_experts=True)
    model = build_model(config, CPU).model
    parameters = [(name, p) for name, p in model.named_parameters() if "layers." in name and "lora_" not in name]
    in_16_bits = sum(p.numel() for _, p in parameters if p.dtype == torch.bfloat16 and p.ndim > 1)
    found = unquantized.of_run(config, model)
    assert found is not None
    assert found.weights == found.without_factors == in_16_bits > 0
    assert found == unquantized.of_run(config, unquantized.foresee(config))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_dense_family_is_refused(tmp_path, family, bits):
    config = settings(save_tiny(tmp_path, family), bits=bits)
    model = build_model(config, META).model
    assert unquantized.of_run(config, model) is None
    assert unquantized.find(model).weights == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("changes", [{"variant": "lora-xs"}, {"init": "pissa", "adapter_dtype": "fp32"}])
def test_parts_of_factors_are_not_taken_for_weights(tmp_path, family, changes):
    assert unquantized.find(build_model(settings(save_tiny(tmp_path, family), **changes), META).model).weights == 0


@pytest.mark.parametrize("kind", [*classifiers.ENCODERS, *classifiers.BOTH])
def test_no_classifier_is_refused(tmp_path, kind):
    """T5 keeps a linear layer in fp32 and a table of positions in its blocks."""
    task = {"task": "text-classification", "labels": ("a", "b")}
    model = build_model(settings(classifiers.save_base(tmp_path, kind), **task), META).model
    assert unquantized.find(model).weights == 0


@pytest.mark.parametrize("kind", text_pairs.KINDS)
def test_no_encoder_decoder_is_refused(tmp_path, kind):
    config = settings(text_pairs.save_base(tmp_path, kind), task="text2text-generation")
    assert unquantized.find(build_model(config, META).model).weights == 0


def test_convolutions_in_the_blocks_are_too_few_to_be_refused():
    """They stay in 16 bits too, as the table of decays does, and 4 bits are still 4 bits."""
    sizes = {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "state_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    found = unquantized.find(model)
    assert found.weights > 0
    assert found.is_minor


def test_16_bits_are_not_refused(mixture):
    build_model(settings(mixture, bits=16), META)


def test_the_figure_is_that_of_all_layers_where_only_some_are_planned(monkeypatch):
    """A plan builds few of the layers that are all alike; a mixture may be told by no setting that is known."""
    from qlora_kit.memory import plan as planning

    config = AutoConfig.for_model("qwen3_moe", **{**_SIZES, **MIXTURES["qwen3_moe"], "num_hidden_layers": 12})
    monkeypatch.setattr(planning, "resolve_architecture", lambda _: config)
    monkeypatch.setattr(planning, "_period", lambda *_: 1)
    with pytest.raises(UserError) as caught:
        plan(settings("demo"))
    whole = AutoModelForCausalLM.from_config(config)
    assert unquantized.find(whole).said in str(caught.value)


@pytest.mark.parametrize("command", ["train", "plan", "profile", "search"])
@pytest.mark.parametrize("preflight", [True, False])
def test_every_command_refuses_it_and_leaves_nothing(tmp_path, mixture, data, capsys, command, preflight):
    flags = ["--model", str(mixture), "--data", str(data), "--device", "cpu", "--seq-len", "32"]
    out = [] if command == "plan" else ["--out", str(tmp_path / "out")]
    more = {"search": ["--r", "2,4", "--folds", "2"]}.get(command, ["--r", "2"])
    with pytest.raises(SystemExit) as caught:
        main([command, *flags, *out, *more, *([] if preflight else ["--no-preflight"])])
    assert caught.value.code == 2
    assert "error: --bits = 4: would leave" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_it_is_allowed_it_is_said_once(tmp_path, mixture, data, capsys):
    said = io.StringIO()
    config = settings(mixture, data=str(data), out=str(tmp_path / "run"), allow_16_bit_experts=True)
    train(config, Console(file=said, width=300))
    assert said.getvalue().count("stay in 16 bits, and none of them gets factors to train") == 1
    for command in ("plan", "profile"):
        flags = ["--model", str(mixture), "--data", str(data), "--device", "cpu", "--seq-len", "32", "--r", "2"]
        out = [] if command == "plan" else ["--out", str(tmp_path / "profile"), "--batch-size", "2", "--steps", "1"]
        main([command, *flags, *out, "--allow-16-bit-experts"])
        assert capsys.readouterr().out.count("stay in 16 bits") == 1


def test_an_adapter_that_was_trained_so_before_the_setting_opens_and_is_not_resumed_unasked(
    tmp_path, mixture, data, capsys
):
    config = settings(mixture, data=str(data), out=str(tmp_path / "run"), allow_16_bit_experts=True, preflight=False)
    folder = train(config, Console(file=io.StringIO())).folder
    record = json.loads((folder / "run.json").read_text())
    del record["settings"]["base"]["allow_16_bit_experts"]
    (folder / "run.json").write_text(json.dumps(record))
    run = find_run(str(folder), {"device": "cpu"})
    assert load_run_model(run, CPU).peft_config
    resume = ["train", "--resume", str(folder), "--device", "cpu", "--out", str(tmp_path / "more")]
    assert "error: --bits = 4: would leave" in fails_quietly(capsys, *resume)
    main([*resume, "--allow-16-bit-experts"])
    assert (tmp_path / "more" / "run.json").is_file()


def fails_quietly(capsys, *args: str) -> str:
    capsys.readouterr()
    return fails(capsys, *args)


def test_the_share_of_factors_that_are_missing_is_said():
    """PEFT puts factors on the experts of some mixtures by itself, and then only the rest has none."""
    found = unquantized.Unquantized(
        example="model.layers.0.mlp.experts.down_proj", weights=1000, without_factors=5, total=2000
    )
    assert found.said_of_factors == "0.5% of them get no factors to train"
    assert dataclasses.replace(found, without_factors=1000).said_of_factors == "none of them gets factors to train"
    assert dataclasses.replace(found, weights=3 * 2**29, total=2**31).said == "75.0% of the model's weights (3.00 GiB)"
    assert messages.unquantized_lines(None, 4) == []
    (line,) = messages.unquantized_lines(dataclasses.replace(found, without_factors=1000), 16)
    assert line.startswith(
        "of 50.0% of the model's weights that are stacks like model.layers.0.mlp.experts.down_proj, "
    )
    assert line.endswith("none of them gets factors to train")
    assert messages.unquantized_lines(dataclasses.replace(found, without_factors=0), 16) == []


def test_in_16_bits_it_is_said_that_experts_get_no_factors(mixture):
    config = settings(mixture, bits=16)
    found = unquantized.of_run(config, build_model(config, META).model)
    assert found is not None
    assert found.without_factors == found.weights > 0
    assert unquantized.of_run(settings(mixture, bits=16, full=True), build_model(config, META).model) is None


def test_what_stays_is_said_with_its_settings_alone():
    assert BaseConfig().allow_16_bit_experts is False
