"""A new task is one folder and one line: a copy of the package with both does all that it does with its own tasks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from classifiers import save_base, save_rows

import qlora_kit

TOY = Path(__file__).parent / "toy" / "scoring"
ROWS = [{"text": f"{'good' if n % 2 else 'bad'} {n}", "score": 1.0 if n % 2 else -1.0} for n in range(24)]


class Copy:
    """A copy of the package with the toy task, called from the command line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        package = Path(qlora_kit.__file__).parent
        shutil.copytree(package, root / "qlora_kit", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(TOY, root / "qlora_kit" / "tasks" / "scoring", ignore=shutil.ignore_patterns("__pycache__"))
        registry = root / "qlora_kit" / "tasks" / "registry.py"
        text = registry.read_text()
        line = '    "token-classification": "tagging",\n'
        assert text.count(line) == 1
        registry.write_text(text.replace(line, f'    "text-scoring": "scoring",\n{line}'))
        self.data = save_rows(root / "data.jsonl", ROWS)
        self.base = save_base(root / "base", "bert")

    def call(self, *args: object) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(self.root), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "qlora_kit", *map(str, args)]
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)

    def run(self, *args: object) -> str:
        done = self.call(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def run(copy):
    settings = ["--model", copy.base, "--data", copy.data, "--eval-data", copy.data, "--seq-len", 32]
    steps = ["--bits", 16, "--lr", 1e-2, "--schedule", "constant", "--warmup", 0, "--batch-size", 8, "--max-steps", 12]
    copy.run("train", *settings, *steps, "--r", 4, "--out", copy.root / "run", "--device", "cpu")
    return copy.root / "run"


@pytest.fixture(scope="module")
def release(copy, run):
    copy.run("merge", "--run", run, "--out", copy.root / "release", "--dtype", "fp32")
    return copy.root / "release"


pytestmark = pytest.mark.slow  # each command is a process of its own


def test_its_name_is_in_the_help_and_in_the_refusal_of_another(copy):
    assert "text-scoring" in copy.run("train", "--help")
    refused = copy.call("train", "--task", "nonesuch", "--bits", 5)
    assert refused.returncode == 2
    assert "--task = 'nonesuch': must be one of text-generation, " in refused.stderr
    assert "text-scoring" in refused.stderr
    assert "--bits = " in refused.stderr


def test_it_is_planned_and_previewed(copy):
    settings = ["--model", copy.base, "--data", copy.data, "--seq-len", 32]
    planned = json.loads(copy.run("plan", *settings, "--json"))
    assert planned["plan"]["n_trainable"] > 0
    shown = copy.run("preview", *settings, "--rows", 2)
    assert "text-scoring: the tokens that the model reads" in shown
    assert "«1»" in shown


def test_it_is_trained_and_evaluated(copy, run):
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["base"]["task"] == "text-scoring"  # as the columns say
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    found = json.loads(copy.run("eval", "--run", run, "--json", "--device", "cpu"))
    assert found["task"] == "text-scoring"
    assert found["models"]["adapter"]["mean_error"] == pytest.approx(
        record["results"]["metrics"]["mean_error"], rel=2**-6
    )
    assert json.loads((run / "evaluation.json").read_text())["metrics"]["examples"] == 24


def test_its_release_is_proven_and_predicts_the_same(copy, run, release):
    report = json.loads((release / "merge_report.json").read_text())
    assert report["release"]["task"] == report["proof"]["model"]["task"] == "text-scoring"
    assert report["proof"]["model"]["loaded_as"] == "BertForSequenceClassification"
    scores = []
    for model in (["--run", run], ["--model", release]):
        lines = copy.run("predict", *model, "--data", copy.data, "--device", "cpu").splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["text"] for answer in answers] == [row["text"] for row in ROWS]
        scores.append([answer["score"] for answer in answers])
    assert scores[1] == pytest.approx(scores[0], abs=0.1)  # fp32 beside bf16
    both = json.loads(copy.run("eval", "--run", run, "--release", release, "--json", "--device", "cpu"))["models"]
    assert both["release"]["mean_error"] == pytest.approx(both["adapter"]["mean_error"], abs=0.1)
