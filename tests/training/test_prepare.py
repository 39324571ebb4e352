"""What comes before the first step is the same whether a run trains or is measured."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from classifiers import ROWS, save_base, save_rows
from families import save_tiny
from rich.console import Console

from qlora_kit import RunConfig, UserError
from qlora_kit.cli import profile
from qlora_kit.model.heads import TaskLoss
from qlora_kit.training.check import check_settings
from qlora_kit.training.prepare import prepare

QUIET = Console(file=io.StringIO())


@pytest.fixture
def classifier(tmp_path):
    """Twice as many rows have the one label: balanced weights are 1.5 and 0.75."""
    base, rows = save_base(tmp_path / "base", "bert"), save_rows(tmp_path / "rows.jsonl", ROWS)
    flat = {"model": str(base), "data": str(rows), "device": "cpu", "bits": 32, "adapter_dtype": "fp32", "r": 4}
    return {**flat, "batch_size": 2, "max_steps": 1, "class_weights": "balanced", "out": str(tmp_path / "run")}


def weights_of(prepared):
    return next(m.weights for m in prepared.built.model.modules() if isinstance(m, TaskLoss)).tolist()


def test_a_profile_weighs_labels_as_the_run_does(classifier, tmp_path, monkeypatch):
    config = RunConfig.from_flat({**classifier, "preflight": False})
    assert weights_of(prepare(config, QUIET)) == pytest.approx([1.5, 0.75])
    seen = []
    forward = TaskLoss.forward

    def noted(self, outputs, mask, labels, n_items):
        if labels.device.type == "cpu":  # else it is a plan
            seen.append(self.weights)
        return forward(self, outputs, mask, labels, n_items)

    monkeypatch.setattr(TaskLoss, "forward", noted)
    profile.run(config, steps=1)
    assert [weights.tolist() for weights in seen] == [pytest.approx([1.5, 0.75])]


def test_what_is_measured_is_the_longest_rows_as_often_as_the_steps_take_them(classifier, tmp_path):
    config = RunConfig.from_flat({**classifier, "max_steps": 20, "eval_fraction": 0.25, "preflight": False})
    prepared = prepare(config, QUIET, measures=True)
    lengths = [len(row.input_ids) for row in prepared.inputs.train.rows]
    assert len(lengths) == 40  # of 18 rows
    assert lengths[:18] == sorted(lengths[:18], reverse=True)
    assert lengths[18] == lengths[0]
    assert prepared.inputs.evaluation is None
    assert prepared.planned.plan is not None  # in any case
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "rows.jsonl"]  # nothing is written


def test_what_a_model_cannot_be_fed_is_refused_before_anything_is_written(tmp_path):
    base = save_tiny(tmp_path / "base", "gemma2")  # its windows are shorter than packed rows
    rows = save_rows(tmp_path / "rows.jsonl", [{"text": "many words of a text " * 3}] * 8)
    flat = {"model": str(base), "data": str(rows), "pack": True, "seq_len": 64, "device": "cpu", "preflight": False}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="the model's attention window has 16"):
        prepare(RunConfig.from_flat({**flat, "lean": "off", "out": str(tmp_path / "run")}), QUIET)
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_optimizer_is_found_with_the_other_faults():
    flat = {"optim": "adam", "full": True, "bits": 16, "lora_plus": 2.0, "report_to": "wandb", "metric": "loss"}
    config = RunConfig.from_flat({**flat, "data": "x.jsonl"})
    with pytest.raises(UserError) as caught:
        check_settings(config)
    found = {fault.setting for fault in caught.value.faults}
    assert {"optim", "lora_plus", "metric"} <= found
    assert "optim = 'adam': is not a known optimizer.\n    Known: paged_adamw_8bit, " in str(caught.value)


IMPORTED = """
import sys, {module}
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("qlora_kit", "transformers", "tyro", "torch")))
"""


def imported_by(module):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(module=module)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def rooms(modules):
    return {name.split(".")[1] for name in modules if name.startswith("qlora_kit.")}


def test_the_planner_needs_neither_training_nor_the_trainer():
    found = imported_by("qlora_kit.memory.plan")
    assert "transformers.trainer" not in found
    assert rooms(found).isdisjoint({"training", "search", "cli", "runs", "release", "evaluate"})


def test_the_trainer_brings_only_what_it_uses():
    found = imported_by("qlora_kit.training.trainer")
    assert rooms(found).isdisjoint({"build", "lean", "memory", "search", "cli", "release", "evaluate"})
    assert not any(name.startswith("qlora_kit.tasks.") and name.count(".") > 2 for name in found)  # no task's own


def test_the_names_of_the_optimizers_need_no_torch():
    assert "torch" not in imported_by("qlora_kit.optim.optimizers")


def test_a_model_is_built_with_what_its_step_needs_beside_it(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    rows = save_rows(tmp_path / "rows.jsonl", [{"text": f"some words {i}"} for i in range(8)])
    flat = {"model": str(base), "data": str(rows), "device": "cpu", "seq_len": 32, "preflight": False, "r": 4}
    step = {"adversarial": "fgm", "rank_penalty": 0.1, "lora_plus": 4.0}
    built = prepare(RunConfig.from_flat({**flat, **step}), QUIET).built
    assert (built.adversary.n_passes, built.rank_penalty, built.lora_plus) == (2, 0.1, 4.0)
    assert {p.untyped_storage()._cdata for p in built.model.parameters() if p.requires_grad} == {
        buffer.parameter.untyped_storage()._cdata for buffer in built.factors.buffers
    }
    plain = prepare(RunConfig.from_flat({**flat, "flat_buffer": False}), QUIET).built
    assert (plain.adversary, plain.rank_penalty, plain.lora_plus, plain.factors) == (None, None, None, None)
    own = {"adversary", "rank_penalty", "lora_plus", "lean_outcomes", "flat_factors", "host_pool"}
    assert own.isdisjoint(vars(built.model))
    assert isinstance(built.model, torch.nn.Module)
