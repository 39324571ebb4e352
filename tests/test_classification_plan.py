"""The planner and the profiler know heads with labels: every kind of model, and the bytes that really live."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from classifiers import KINDS, ROWS, save_base, save_rows
from rich.console import Console

from qlora_kit import BaseConfig, DataConfig, OptimConfig, RunConfig, train
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
