"""The training run end to end, on tiny random models."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, UserError, train
from qlora_kit.optim.optimizers import resolve_optim
from qlora_kit.training import run

STEADY = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [json.dumps({"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1}"}) for i in range(24)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def contrary_data(tmp_path_factory) -> Path:
    """Held-out answers that grow less likely with every step: none has a digit."""
    file = tmp_path_factory.mktemp("data") / "contrary.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"add {i}", "completion": "~~~~"}) for i in range(4)))
    return file


@pytest.fixture
def config(tiny_base, tiny_data, tmp_path) -> RunConfig:
    """A run of six steps with evaluation and checkpoints every two, and dropout so that random states matter."""
    return RunConfig(
        base=BaseConfig(model=str(tiny_base), bits=4, device="cpu"),
        adapter=AdapterConfig(r=4, dropout=0.1),
        data=DataConfig(data=str(tiny_data), eval_data=str(tiny_data), seq_len=64),
        optim=OptimConfig(lr=5e-3, max_steps=6, batch_size=4),
        evaluation=EvalConfig(eval_steps=2, keep_best=False, keep_checkpoints=9),
        out=str(tmp_path / "run"),
        preflight=False,  # tested apart, in test_preflight.py
    )


def changed(config: RunConfig, **groups) -> RunConfig:
    """`config` with some settings of some groups replaced."""
    new = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **new)


def factors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def metrics(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]  # an answer may hold other ends of lines


def test_a_run_leaves_a_whole_folder(config):
    result = train(config, QUIET)
    assert result.folder == Path(config.out)
    assert {p.name for p in result.folder.iterdir()} == {
        "run.json",
        "adapter",
        "metrics.jsonl",
        "checkpoints",
        "README.md",
    }
    assert {p.name for p in result.folder.parent.iterdir()} == {"run"}
    record = json.loads((result.folder / "run.json").read_text())
    assert RunConfig.from_flat({k: v for g in record["settings"].values() if isinstance(g, dict) for k, v in g.items()})
    assert record["base_hash"].startswith("sha256:")
    assert record["results"]["steps"] == result.steps == 6
    losses = [line["loss"] for line in metrics(result.folder) if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert [line["step"] for line in metrics(result.folder) if "eval_loss" in line] == [2, 4, 6]
    assert all(line["sample"]["expected"] for line in metrics(result.folder) if "sample" in line)
    assert result.eval_loss == next(m["eval_loss"] for m in reversed(metrics(result.folder)) if "eval_loss" in m)
    assert result.train_loss == pytest.approx(sum(losses) / 6)
    assert not list(result.folder.rglob("*.bin"))  # no pickled settings


def test_nothing_that_is_written_names_a_secret(config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    folder = train(changed(config, optim={"max_steps": 1}), QUIET).folder
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"verysecret" not in file.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_stock_peft_loads_its_adapter(tmp_path, config, family):
    folder = save_tiny(tmp_path / "base", family)
    result = train(changed(config, base={"model": str(folder)}, optim={"max_steps": 2}), QUIET)
    warns = (
        pytest.warns(UserWarning, match="fan_in_fan_out") if family == "gpt2" else contextlib.nullcontext()
    )  # trap 17
    with warns:
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(result.adapter))
    stock_factors = {k for k, _ in stock.named_parameters() if "lora_" in k}
    assert len(stock_factors) == len(factors(result.adapter))
    assert all(value.any() for value in factors(result.adapter).values())


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_every_number_of_bits_trains(config, bits):
    result = train(changed(config, base={"bits": bits}, optim={"max_steps": 2}), QUIET)
    assert result.train_loss > 0


def test_full_fine_tuning_leaves_a_model(config):
    result = train(changed(config, base={"bits": 32, "full": True}, optim={"max_steps": 2, "lr": 1e-4}), QUIET)
    assert result.adapter.name == "model"
    AutoModelForCausalLM.from_pretrained(result.adapter)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw", "adamw_8bit", "lion_8bit", "sgd"])
def test_every_optimizer_trains(config, optim):
    """Trap 11: on a CPU the paged ones fall back, and the run must still be right.

    r = 64, for bitsandbytes keeps 8-bit states only for tensors of 4096 elements or more.
    """
    config = changed(config, adapter={"r": 64}, optim={"optim": optim, "max_steps": 2})
    result = train(config, QUIET)
    assert all(value.any() for value in factors(result.adapter).values())
    state = torch.load(result.folder / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert (torch.uint8 in set(dtypes_in(state))) == optim.endswith("8bit")


def dtypes_in(state):
    """The dtypes of all tensors in an optimizer's state, which bitsandbytes nests one level deeper."""
    for value in state.values():
        if isinstance(value, dict):
            yield from dtypes_in(value)
        elif torch.is_tensor(value):
            yield value.dtype


def test_the_default_optimizer_pages_at_four_bits_on_cuda_only():
    """Trap 10: 8-bit kernels compile for seconds on a CPU."""
    assert resolve_optim(RunConfig(), torch.device("cuda")) == "paged_adamw_8bit"
    assert resolve_optim(RunConfig(), torch.device("cpu")) == "adamw"
    assert resolve_optim(RunConfig(base=BaseConfig(bits=16)), torch.device("cuda")) == "adamw"


def test_evaluating_changes_nothing(config):
    """Bit for bit: the loader, generation and evaluation mode all touch the random state or the weights (trap 1)."""
    with_evaluations = train(config, QUIET)
    without = train(
        changed(config, data={"eval_data": None}, evaluation={"eval_steps": None}, out=config.out + "2"), QUIET
    )
    assert same(factors(with_evaluations.adapter), factors(without.adapter))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"optim": {"schedule": "constant"}}, [2, 4, 6]),
        ({"adapter": {"r": 64}, "optim": {"grad_accum": 2, "max_steps": 5, "optim": "adamw_8bit"}}, [2, 4]),
        ({"adapter": {"r": 64}, "optim": {"optim": "lion_8bit"}}, [4]),
        ({"adapter": {"rank_pattern": {"up_proj": 2}, "layers": "1"}, "optim": {"lora_plus": 4.0}}, [2]),
        ({"adapter": {"init": "pissa", "adapter_dtype": "fp32"}, "optim": {"lora_plus": 2.0}}, [2]),
        ({"adapter": {"variant": "lora-xs"}}, [4]),
        ({"adapter": {"init": "eva"}}, [2]),
        ({"optim": {"neftune": 5.0, "adversarial": "pgd", "adversarial_steps": 2, "rank_penalty": 0.01}}, [4]),
        ({"adapter": {"dora": True, "adapter_dtype": "fp32"}, "data": {"pack": True}}, [2]),
        ({"optim": {"max_steps": None, "epochs": 1.5}, "evaluation": {"eval_steps": 2}}, [4, 6]),
    ],
)
def test_resuming_ends_with_the_same_weights(config, settings, steps):
    config = changed(config, **settings)
    whole = train(config, QUIET)
    for step in steps:
        resumed = train(
            changed(config, resume=f"{config.out}/checkpoints/checkpoint-{step}", out=f"{config.out}-{step}"), QUIET
        )
        assert resumed.steps == whole.steps
        assert resumed.train_loss == pytest.approx(whole.train_loss)
        assert same(factors(resumed.adapter), factors(whole.adapter))
        assert [m.get("loss") for m in metrics(resumed.folder)] == [m.get("loss") for m in metrics(whole.folder)]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(config, tmp_path):
    whole = train(config, QUIET)
    out = tmp_path / "killed"
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({**config.to_dict(), "out": str(out)}))
    command = [sys.executable, "-m", "qlora_kit", "train", "--config", str(settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = Path(f"{out}.partial")
    deadline_s = time.monotonic() + 120
    while not (partial / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert partial.is_dir()
    resumed = train(changed(config, resume=str(out), out=None), QUIET)
    assert resumed.folder == out
    assert not partial.exists()
    assert same(factors(resumed.adapter), factors(whole.adapter))


def test_a_second_run_into_a_folder_where_one_is_at_work_is_refused_and_does_the_first_no_harm(config):
    alone = train(changed(config, out=config.out + "-alone"), QUIET)
    refusals = []

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if "step 4:" in text and not refusals:
                for other in ({"overwrite": True}, {"overwrite": False}, {"resume": config.out, "out": None}):
                    with pytest.raises(UserError) as caught:
                        train(changed(config, **other), QUIET)
                    refusals.append(str(caught.value))
            return super().write(text)

    first = train(config, Console(file=Interrupting(), width=200))
    assert len(refusals) == 3
    assert all(f"another run is at work in {config.out}.partial" in text for text in refusals)
    assert same(factors(first.adapter), factors(alone.adapter))
    assert [m.get("loss") for m in metrics(first.folder)] == [m.get("loss") for m in metrics(alone.folder)]


@pytest.mark.parametrize("where", ["", ".partial"])
def test_a_users_own_folder_is_not_removed_when_told_to_overwrite(config, where):
    theirs = Path(config.out + where)
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="never replaced"):
        train(changed(config, overwrite=True), QUIET)
    assert [(p.name, p.read_text()) for p in theirs.iterdir()] == [("thesis.txt", "precious")]
    assert [p.name for p in theirs.parent.iterdir()] == [theirs.name]


def test_a_run_that_fails_lets_go_of_its_folder(config):
    with pytest.raises(UserError, match="Lower --lr"):
        train(changed(config, optim={"lr": 1e30, "schedule": "constant", "clip": 1e30, "optim": "sgd"}), QUIET)
    assert train(changed(config, overwrite=True), QUIET).steps == 6


def test_the_best_checkpoint_is_what_is_left(config, contrary_data):
    """The last evaluation is not the best."""
    config = changed(config, optim={**STEADY, "max_steps": 4}, evaluation={"keep_best": True})
    config = changed(config, data={"eval_data": str(contrary_data)})
    result = train(config, QUIET)
    losses = {m["step"]: m["eval_loss"] for m in metrics(result.folder) if "eval_loss" in m}
    best = min(losses, key=losses.__getitem__)
    assert best == 2
    assert result.eval_loss == losses[best]
    assert same(factors(result.adapter), factors(result.folder / "checkpoints" / f"checkpoint-{best}"))


def test_early_stopping_stops(config, contrary_data):
    config = changed(config, optim={**STEADY, "max_steps": 40}, evaluation={"keep_best": True, "early_stopping": 2})
    config = changed(config, data={"eval_data": str(contrary_data)})
    assert train(config, QUIET).steps < 40


def test_the_run_repeats_from_its_run_json(config, tmp_path):
    from qlora_kit.config.files import read_settings_file

    first = train(config, QUIET)
    flat = read_settings_file(first.folder / "run.json")
    again = train(RunConfig.from_flat({**flat, "out": str(tmp_path / "again")}), QUIET)
    assert same(factors(first.adapter), factors(again.adapter))


def test_random_weights_need_nothing_and_say_what_they_are(config, tmp_path):
    said = io.StringIO()
    config = changed(
        config,
        base={"model": "pythia-70m", "weights": "random"},
        optim={"max_steps": 1, "batch_size": 1},
        evaluation={"eval_steps": None},
        data={"eval_data": None, "seq_len": 16},
    )
    result = train(config, Console(file=said))
    assert "random weights" in said.getvalue()
    assert "random weights" in (result.adapter / "README.md").read_text()


def test_checkpointing_recomputes_without_reentrance(config, monkeypatch):
    """Trap 12: the reentrant kind never stops the recomputation early, and needs inputs with gradients."""
    calls = []
    original = LlamaMLP.forward

    def counted(self, x):
        calls.append(torch.is_grad_enabled())
        return original(self, x)

    def reentrant(*_):
        raise AssertionError("the reentrant checkpoint was used")

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "forward", staticmethod(reentrant))
    config = changed(config, data={"eval_data": None}, evaluation={"eval_steps": None}, optim={"max_steps": 1})
    with_it = train(config, QUIET)
    assert len(calls) == 4  # two blocks, each run twice
    calls.clear()
    without = train(changed(config, optim={"gradient_checkpointing": False}, out=config.out + "2"), QUIET)
    assert len(calls) == 2
    assert same(factors(with_it.adapter), factors(without.adapter))


def test_packing_trains_and_evaluates(config):
    result = train(changed(config, data={"pack": True}), QUIET)
    unpacked = train(changed(config, out=config.out + "2"), QUIET)
    first = lambda r: next(m for m in metrics(r.folder) if "eval_loss" in m)["eval_tokens"]  # noqa: E731
    assert first(result) == first(unpacked)  # packing supervises the same tokens


def test_exact_match_is_counted_before_and_after(config):
    result = train(changed(config, evaluation={"exact_match": 5}), QUIET)
    assert result.exact_match_before == 0
    assert result.exact_match_after is not None


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(config):
    config = changed(
        config,
        optim={"lr": 1e30, "schedule": "constant", "warmup": 0.0, "clip": 1e30, "optim": "sgd", "max_steps": 30},
        evaluation={"eval_steps": 1},
    )
    with pytest.raises(UserError, match="Lower --lr"):
        train(config, QUIET)
    assert not Path(config.out).exists()
    left = Path(f"{config.out}.partial") / "checkpoints"
    for kept in left.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in factors(kept).values())


def test_tensorboard_files_are_written_when_asked_for(config):
    result = train(changed(config, report_to=("tensorboard",), optim={"max_steps": 1}), QUIET)
    assert list((result.folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"seq_len": 4096}}, "--seq-len"),
        ({"adapter": {"targets": ("q_porj",)}}, "q_proj"),
        ({"data": {"data": "no/such/file.jsonl"}}, "--data"),
        ({"data": {"eval_data": None}}, "needs held-out data"),
        ({"base": {"full": True, "bits": 16}, "optim": {"lora_plus": 4.0}}, "--lora-plus = 4.0: is for adapters"),
        ({"base": {"full": True, "bits": 16}, "optim": {"rank_penalty": 0.1}}, "--rank-penalty = 0.1: is for adapters"),
        ({"adapter": {"variant": "lora-xs"}, "optim": {"lora_plus": 4.0}}, "--lora-plus = 4.0: needs both factors"),
        ({"adapter": {"init": "loftq", "adapter_dtype": "fp32"}, "base": {"bits": 16}}, "--init = 'loftq'"),
        ({"adapter": {"init": "eva", "r": 64}}, "needs at least 128 supervised tokens"),
        ({"adapter": {"layers": "7"}}, "--layers = '7': names blocks that the model has not"),
        ({"adapter": {"rank_pattern": {"q_porj": 2}}}, "--rank-pattern = 'q_porj=2': matches no layer"),
        ({"resume": "no/such/run"}, "--resume"),
        ({"evaluation": {"save_steps": 3, "keep_best": True}}, "multiple"),
        ({"evaluation": {"early_stopping": 2}}, "--no-keep-best"),
        ({"out": "/proc/nowhere/x"}, "--out"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(config, settings, message):
    config = changed(config, **settings)
    with pytest.raises(UserError, match=message):
        train(config, QUIET)
    assert not Path(config.out).parent.exists() or not list(Path(config.out).parent.iterdir())


def test_a_tokenizer_larger_than_the_model_is_refused(config, shared_data):
    with pytest.raises(UserError, match="vocabulary ends at"):
        train(changed(config, base={"tokenizer": str(shared_data / "gpt2-tokenizer")}), QUIET)


def test_resuming_with_other_settings_names_each_that_differs(config):
    train(config, QUIET)
    other = changed(
        config, adapter={"r": 8, "adapter_dtype": "fp32"}, optim={"optim": "sgd", "lr": 1e-4}, seed=7, resume=config.out
    )
    with pytest.raises(UserError) as caught:
        train(dataclasses.replace(other, out=config.out + "2"), QUIET)
    assert {f.setting for f in caught.value.faults} == {"--r", "--adapter-dtype", "--optim", "--lr", "--seed"}
    assert not Path(config.out + "2.partial").exists()


def test_the_factor_whose_gradient_is_no_number_is_named_alone(config, monkeypatch):
    """The check comes before clipping, which would spread one NaN to every factor."""
    build = run.build_model

    def poisoned(*args):
        model = build(*args)
        parameter = next(p for n, p in model.named_parameters() if "layers.1.self_attn.v_proj.lora_B" in n)
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(run, "build_model", poisoned)
    with pytest.raises(UserError) as caught:
        train(config, QUIET)
    assert [f.setting for f in caught.value.faults] == [
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    ]
    assert not list(Path(config.out).parent.iterdir())


@pytest.mark.parametrize("bits", [4, 16])
def test_a_base_that_lacks_weights_is_refused(tmp_path, config, bits):
    folder = save_tiny(tmp_path / "base", "llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1." not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="its files lack"):
        train(changed(config, base={"model": str(folder), "bits": bits}), QUIET)


def test_what_is_cut_and_left_out_is_said_and_recorded(config):
    said = io.StringIO()
    result = train(changed(config, data={"seq_len": 14}, optim={"max_steps": 1}), Console(file=said, width=200))
    record = json.loads((result.folder / "run.json").read_text())
    assert record["truncated"] > 0
    assert f"{record['truncated']} are cut at 14 tokens" in said.getvalue()


def test_mistakes_in_model_data_and_length_come_in_one_message(config):
    config = changed(config, data={"data": "none.jsonl", "seq_len": 4096, "eval_data": "nor-this.jsonl"})
    with pytest.raises(UserError) as caught:
        train(config, QUIET)
    assert {f.setting for f in caught.value.faults} == {"data", "eval_data", "seq_len"}


def test_a_write_protected_or_full_place_during_the_run_is_one_message(config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_kit.runs.folder.append_metrics", full)
    monkeypatch.setattr("qlora_kit.training.trainer.append_metrics", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(config, QUIET)
    assert not list(Path(config.out).parent.iterdir())
