"""The planner and the profiler know heads with labels: every kind of model, and the bytes that really live."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import text_pairs
from classifiers import KINDS, ROWS, SENTENCES, save_base, save_rows
from rich.console import Console

from qlora_kit import BaseConfig, DataConfig, OptimConfig, RunConfig, train
from qlora_kit.cli.main import main
from qlora_kit.memory.plan import plan


def settings(folder, **base):
    return RunConfig(
        base=BaseConfig(
            model=str(folder), task="text-classification", labels=("no", "yes"), device="cpu", **{"bits": 4, **base}
        ),
        data=DataConfig(seq_len=32),
        optim=OptimConfig(batch_size=4, gradient_checkpointing=False),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_planned(kind, tmp_path):
    found = plan(settings(save_base(tmp_path, kind)))
    assert {"forward", "loss", "backward", "optimizer"} <= set(found.phases)
    assert found.components["quantized weights"] > 0
    assert sum(found.components.values()) == found.peak_bytes


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_profile_of_real_steps_agrees_with_the_plan_of_them(kind, tmp_path):
    config = settings(save_base(tmp_path / "base", kind), bits=32)
    config = dataclasses.replace(
        config,
        data=DataConfig(data=str(save_rows(tmp_path / "a.jsonl", ROWS)), seq_len=32),
        optim=OptimConfig(batch_size=4, max_steps=3),
        profile=True,
        out=str(tmp_path / "run"),
    )
    folder = train(config, Console(file=io.StringIO())).folder
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["predicted"]["peak_bytes"] == pytest.approx(profile["peak_bytes"], rel=0.01)
    assert (folder / "plan.json").is_file()


NUMBERS = [{"text": f"{'ab' * (i % 4)} {i}", "label": i % 3} for i in range(12)]
QUESTIONS = [
    {"question": "who?", "context": f"Ann is {i}", "answers": {"text": ["Ann"], "answer_start": [0]}} for i in range(8)
]


@pytest.mark.parametrize(
    ("kind", "rows", "task"),
    [
        ("gpt2", NUMBERS, "text-classification (as the data and the model say): 3 labels"),
        ("bert", SENTENCES, "token-classification (as the data and the model say): 4 labels"),
        ("bert", QUESTIONS, "question-answering (as the data and the model say)"),
        ("t5", [{"source": "a", "target": "b"}], "text2text-generation (as the data and the model say)"),
    ],
)
def test_the_data_say_what_is_planned_and_profiled(kind, rows, task, tmp_path, capsys):
    """Without --task too: what is planned and measured is the model that `train` would make of the same flags."""
    base = (text_pairs.save_base if kind == "t5" else save_base)(tmp_path / "base", kind)
    data = save_rows(tmp_path / "a.jsonl", rows)
    flags = ["--model", str(base), "--data", str(data), "--seq-len", "32", "--batch-size", "2", "--device", "cpu"]
    main(["plan", *flags, "--no-baselines"])
    assert f"task: {task}" in capsys.readouterr().out
    main(["profile", *flags, "--steps", "1", "--bits", "16", "--out", str(tmp_path / "profile")])
    assert f"task: {task}" in capsys.readouterr().out
    record = json.loads((tmp_path / "profile" / "run.json").read_text())
    assert record["settings"]["base"]["task"] == task.split()[0]
