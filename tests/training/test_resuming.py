"""What may be another when a run goes on: refused, or obeyed as a run without interruption would have."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_tiny
from rich.console import Console
from safetensors.torch import load_file

from qlora_kit import UserError, train
from qlora_kit.cli.main import main
from qlora_kit.config.rules import default_of
from qlora_kit.config.settings import RunConfig, settings
from qlora_kit.runs.folder import find_resume_point
from qlora_kit.training import resuming
from qlora_kit.training.schedule import share_of_rate

QUIET = Console(file=io.StringIO())
CPU = torch.device("cpu")
OTHER = {  # (a) another value is refused: with it, the steps so far would have been others
    "model": "other",
    "revision": "main",
    "weights": "random",
    "bits": 8,
    "quant_type": "fp4",
    "double_quant": False,
    "full": True,
    "tokenizer": "other",
    "trust_remote_code": True,
    "task": "text2text-generation",
    "labels": ("a", "b"),
    "multi_label": True,
    "source_prefix": "a: ",
    "r": 8,
    "alpha": 1.0,
    "dropout": 0.5,
    "targets": ("q_proj",),
    "layers": "1",
    "rank_pattern": {"q_proj": 2},
    "adapter_dtype": "fp32",
    "rslora": True,
    "dora": True,
    "variant": "lora-xs",
    "init": "gaussian",
    "data": "other",
    "eval_fraction": 0.5,
    "columns": {"prompt": "a"},
    "train_on": "all",
    "seq_len": 32,
    "pack": True,
    "optim": "sgd",
    "lr": 1e-5,
    "lora_plus": 2.0,
    "schedule": "linear",
    "warmup": 0.5,
    "clip": 0.5,
    "weight_decay": 0.1,
    "batch_size": 2,
    "grad_accum": 2,
    "class_weights": "balanced",
    "neftune": 5.0,
    "adversarial": "fgm",
    "adversarial_epsilon": 0.5,
    "adversarial_steps": 2,
    "rank_penalty": 0.1,
    "lean": "off",
    "flat_buffer": False,
    "metric": "loss",
    "seed": 7,
}
OBEYED = {  # (b) is obeyed from the resumption on, each by a test below
    *("max_steps", "epochs", "eval_data"),
    *("eval_steps", "save_steps", "keep_checkpoints", "keep_best", "early_stopping", "exact_match"),
}
WITHOUT_INFLUENCE = {  # (c) where and how the same steps are computed, and what is written besides
    *("device", "allow_16_bit_experts", "gradient_checkpointing"),
    *("chunked_loss", "lora_first", "half_blocks", "offload_activations", "offload_embedding", "tiled_mlp"),
    *("rms_norm", "tanh_gelu", "maskless_padding", "attention_by_row", "varlen"),
    *("out", "overwrite", "resume", "preflight", "profile", "report_to"),
}
NEEDED = {
    "full": {"bits": 16},
    "adversarial_epsilon": {"adversarial": "fgm"},
    "adversarial_steps": {"adversarial": "pgd"},
}
NEEDED["eval_fraction"] = {"eval_data": None}
NEEDED["multi_label"] = {"task": "text-classification", "labels": ("a",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resuming")


@pytest.fixture(scope="module")
def config(folder) -> RunConfig:
    """Four steps of six in an epoch, dropout so that random states matter, an evaluation every two."""
    rows = [{"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1}"} for i in range(24)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    contrary = [{"prompt": f"add {i}", "completion": "~~~~"} for i in range(4)]  # grow less likely with every step
    (folder / "contrary.jsonl").write_text("\n".join(map(json.dumps, contrary)))
    flat = {"model": str(save_tiny(folder / "base", "llama")), "device": "cpu", "r": 4, "dropout": 0.1, "seq_len": 64}
    flat |= {"data": str(folder / "data.jsonl"), "eval_data": str(folder / "contrary.jsonl"), "preflight": False}
    flat |= {"lr": 1e-2, "schedule": "constant", "max_steps": 4, "batch_size": 4, "eval_steps": 2}
    return RunConfig.from_flat({**flat, "keep_checkpoints": 9, "keep_best": False, "out": str(folder / "run")})


@pytest.fixture(scope="module")
def run(config) -> Path:
    return train(config, QUIET).folder


def changed(config: RunConfig, **flat: object) -> RunConfig:
    nested = {f.name: getattr(getattr(config, g) if g else config, f.name) for g, f, _ in settings()}
    return RunConfig.from_flat({**nested, **flat})


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in metrics(run) if "loss" in line]


def evaluated(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run) if "eval_loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(adapter / "adapter_model.safetensors") for adapter in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(config: RunConfig, run: Path, **flat: object) -> dict[str, str]:
    """The settings that are at fault when `run` is resumed with others, with what is said of them."""
    point = find_resume_point(str(run))
    with pytest.raises(UserError) as caught:
        resuming.check_resumable(resuming.as_before(changed(config, **flat), point), point, CPU)
    return {fault.setting: str(fault) for fault in caught.value.faults}


# ---------------------------------------------------------------------------------------------- every setting has a law


def test_every_setting_is_told_what_it_is_when_a_run_goes_on():
    names = [field.name for _, field, _ in settings()]
    assert sorted([*OTHER, *OBEYED, *WITHOUT_INFLUENCE]) == sorted(names)
    assert (resuming.FREE | resuming.BY_RULE) - {"optim"} == OBEYED | WITHOUT_INFLUENCE


@pytest.mark.parametrize("name", OTHER)
def test_what_the_steps_so_far_depend_on_is_refused_in_words(config, run, name):
    said = refused(config, run, **NEEDED.get(name, {}), **{name: OTHER[name]})
    value = getattr(next(getattr(config, g) if g else config for g, f, _ in settings() if f.name == name), name)
    was = {"optim": "adamw", "task": "text-generation"}.get(name, value)  # what they were found to be
    assert f"{name} = {OTHER[name]!r}: was {was!r} in the run to resume." in said[name]


@pytest.mark.parametrize("name", sorted(WITHOUT_INFLUENCE))
def test_what_has_no_influence_may_be_another(config, run, name):
    field = next(field for _, field, _ in settings() if field.name == name)
    default, rule = default_of(field), field.metadata["rule"]
    own = {"device": "auto", "report_to": ("tensorboard",), "out": "x", "resume": "x"}
    other = own.get(name, "on" if rule else not default)
    point = find_resume_point(str(run))
    resuming.check_resumable(resuming.as_before(changed(config, **{name: other}), point), point, CPU)


def test_all_that_differs_comes_in_one_message(config, run, capsys):
    flags = ["--lr", "1e-5", "--weight-decay", "0.1", "--schedule", "linear", "--warmup", "0.5", "--clip", "0.5"]
    with pytest.raises(SystemExit) as caught:
        main(["train", "--resume", str(run), *flags, "--out", str(run) + "-refused"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "--lr = 1e-05: was 0.01 in the run to resume." in said
    assert [flag for flag in flags[::2] if flag not in said] == []
    assert not Path(str(run) + "-refused.partial").exists()


def test_the_same_value_typed_again_is_no_other(config, run, tmp_path):
    flags = ["--lr", "0.01", "--schedule", "constant", "--max-steps", "4", "--optim", "adamw"]
    main(["train", "--resume", str(run), *flags, "--out", str(tmp_path / "again")])
    assert same_weights(run / "adapter", tmp_path / "again" / "adapter")


def test_an_optimizer_that_the_device_would_choose_otherwise_is_refused(config, run):
    """The states of the one are not those of the other."""
    point = find_resume_point(str(run))
    config = resuming.as_before(config, point)
    with pytest.raises(UserError, match="optim = 'paged_adamw_8bit': was 'adamw' in the run to resume") as caught:
        resuming.check_resumable(changed(config, device="auto"), point, torch.device("cuda"))
    assert "Add optim=adamw" in str(caught.value)
    resuming.check_resumable(changed(config, device="auto", optim="adamw"), point, torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------ longer, shorter


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"max_steps": 8}, {"max_steps": None, "epochs": 1.5}])
def test_a_run_made_longer_is_the_run_that_was_never_stopped(config, tmp_path, more):
    """Bit for bit, over the end of an epoch; and every step has the rate that it would have had."""
    first = {"max_steps": 4} if "epochs" not in more else {"max_steps": None, "epochs": 0.5}
    short = train(changed(config, **first, out=str(tmp_path / "short")), QUIET)
    longer = changed(config, **more)
    whole = train(changed(longer, out=str(tmp_path / "whole")), QUIET)
    went_on = train(changed(longer, resume=str(short.folder), out=str(tmp_path / "longer")), QUIET)
    assert short.steps < went_on.steps == whole.steps
    assert rates(went_on.folder) == rates(whole.folder) == [0.01] * whole.steps
    assert [m["loss"] for m in metrics(went_on.folder) if "loss" in m] == [
        m["loss"] for m in metrics(whole.folder) if "loss" in m
    ]
    assert same_weights(went_on.adapter, whole.adapter)
    assert evaluated(whole.folder)[-1] == evaluated(went_on.folder)[-1]


def test_a_run_made_longer_keeps_its_best_checkpoint(config, tmp_path):
    """Also where the folder got its final name meanwhile: what trains on grows worse with every step."""
    settings = changed(config, keep_best=True)
    whole = train(changed(settings, max_steps=8, out=str(tmp_path / "whole")), QUIET)
    short = train(changed(settings, out=str(tmp_path / "short")), QUIET)
    longer = train(changed(settings, max_steps=8, resume=str(short.folder), out=str(tmp_path / "longer")), QUIET)
    assert same_weights(longer.adapter, short.folder / "checkpoints" / "checkpoint-2")
    assert same_weights(longer.adapter, whole.adapter)
    assert longer.eval_loss == whole.eval_loss
    assert (longer.folder / "checkpoints" / "checkpoint-2").is_dir()  # so that the next one finds it again


def test_a_best_checkpoint_that_is_gone_is_said_and_no_figure_of_it_is_kept(config, tmp_path):
    short = train(changed(config, keep_best=True, out=str(tmp_path / "short")), QUIET)
    shutil.rmtree(short.folder / "checkpoints" / "checkpoint-2")
    said = io.StringIO()
    settings = changed(config, keep_best=True, max_steps=6, resume=str(short.folder), out=str(tmp_path / "longer"))
    longer = train(settings, Console(file=said, width=200))
    assert "the best checkpoint so far is gone" in said.getvalue()
    assert longer.eval_loss == next(m["eval_loss"] for m in metrics(longer.folder)[::-1] if "eval_loss" in m)


def test_the_figure_of_a_run_is_that_of_the_weights_it_leaves(config, tmp_path):
    """The best evaluation may have no checkpoint: step 3 here."""
    settings = changed(config, keep_best=True, eval_steps=1, save_steps=4, max_steps=4, out=str(tmp_path / "run"))
    result = train(settings, QUIET)
    at = {m["step"]: m["eval_loss"] for m in metrics(result.folder) if "eval_loss" in m}
    assert at[3] < at[4] == result.eval_loss
    assert same_weights(result.adapter, result.folder / "checkpoints" / "checkpoint-4")


@pytest.mark.parametrize(
    ("schedule", "warmup", "is_allowed"),
    [
        ("constant", 0.5, True),  # which has no warm-up
        ("constant_with_warmup", 0.03, True),
        ("constant_with_warmup", 0.5, False),
        ("cosine", 0.03, False),
        ("linear", 0.0, False),
        ("cosine", 0.9, False),
    ],
)
def test_another_number_of_steps_is_refused_where_it_changes_the_rates_so_far(
    config, tmp_path, schedule, warmup, is_allowed
):
    before = changed(config, schedule=schedule, warmup=warmup, out=str(tmp_path / "run"), max_steps=2, eval_steps=1)
    run = train(before, QUIET).folder
    longer = changed(before, max_steps=4, resume=str(run), out=str(tmp_path / "longer"))
    if not is_allowed:
        with pytest.raises(UserError, match=f"max_steps = 4: was 2 .* with schedule={schedule} another number"):
            train(longer, QUIET)
        return
    whole = train(changed(before, max_steps=4, out=str(tmp_path / "whole")), QUIET)
    went_on = train(longer, QUIET)
    assert rates(went_on.folder) == rates(whole.folder)
    assert same_weights(went_on.adapter, whole.adapter)


def test_the_shares_of_the_rate_are_those_that_a_run_had(config, tmp_path):
    settings = changed(config, schedule="cosine", warmup=0.5, max_steps=4, out=str(tmp_path / "run"))
    run = train(settings, QUIET).folder
    assert rates(run) == [0.01 * share_of_rate(settings.optim, 4, step) for step in range(4)]


def test_a_run_may_end_earlier_but_not_before_its_checkpoint(config, run, tmp_path):
    settings = changed(config, resume=f"{run}/checkpoints/checkpoint-2", out=str(tmp_path / "shorter"))
    with pytest.raises(UserError, match="max_steps = 1: ends at step 1, and the checkpoint is of step 2"):
        train(changed(settings, max_steps=1), QUIET)
    shorter = train(changed(settings, max_steps=3), QUIET)
    whole = train(changed(config, max_steps=3, out=str(tmp_path / "whole")), QUIET)
    assert shorter.steps == 3
    assert same_weights(shorter.adapter, whole.adapter)


def test_epochs_beside_max_steps_are_refused(config, run):
    said = refused(config, run, epochs=3.0)
    assert said["epochs"].startswith("epochs = 3.0: has no effect: the run to resume has max_steps=4.")
    assert "Give max_steps instead." in said["epochs"]


# --------------------------------------------------------------------------------------------- evaluations, checkpoints


def test_when_to_evaluate_and_to_save_is_obeyed(config, run, tmp_path):
    settings = changed(config, max_steps=8, eval_steps=1, save_steps=3, keep_checkpoints=1, exact_match=2)
    result = train(changed(settings, resume=str(run), out=str(tmp_path / "longer")), QUIET)
    assert evaluated(result.folder) == [2, 4, 5, 6, 7, 8]
    assert {p.name for p in (result.folder / "checkpoints").iterdir()} == {"checkpoint-8"}
    assert result.exact_match_before == 0


def test_early_stopping_counts_what_was_evaluated_before(config, run, tmp_path):
    """At 2 the best, at 4 one worse: 6 is the second, and there a run without interruption ends too."""
    settings = changed(config, keep_best=True, max_steps=20, early_stopping=2)
    short = train(changed(config, keep_best=True, out=str(tmp_path / "short")), QUIET)
    went_on = train(changed(settings, resume=str(short.folder), out=str(tmp_path / "longer")), QUIET)
    whole = train(changed(settings, out=str(tmp_path / "whole")), QUIET)
    assert went_on.steps == whole.steps == 6


def test_held_out_data_may_lie_elsewhere_but_not_be_other_where_the_best_is_chosen_by_it(config, tmp_path, folder):
    short = train(changed(config, keep_best=True, out=str(tmp_path / "short")), QUIET)
    again = changed(config, keep_best=True, max_steps=6, resume=str(short.folder), out=str(tmp_path / "longer"))
    with pytest.raises(UserError, match="other held-out examples than those that the best checkpoint") as caught:
        train(changed(again, eval_data=str(folder / "data.jsonl")), QUIET)
    assert "keep_best=False" in str(caught.value)
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_bytes((folder / "contrary.jsonl").read_bytes())
    moved = train(changed(again, eval_data=str(elsewhere)), QUIET)
    assert same_weights(moved.adapter, short.folder / "checkpoints" / "checkpoint-2")
    other = changed(again, keep_best=False, eval_data=str(folder / "data.jsonl"), out=str(tmp_path / "other"))
    figures = [m["eval_loss"] for m in metrics(train(other, QUIET).folder) if "eval_loss" in m]
    assert figures[-1] < figures[0]  # of what it trains on


def test_the_best_may_be_kept_from_the_resumption_on(config, run, tmp_path):
    settings = changed(config, keep_best=True, max_steps=6, resume=str(run), out=str(tmp_path / "longer"))
    result = train(settings, QUIET)
    assert same_weights(result.adapter, run / "checkpoints" / "checkpoint-2")
    assert dataclasses.asdict(result)["steps"] == 6
