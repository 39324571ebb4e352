"""The scripts and the notebook of `examples/`, run as a reader runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = "tutorial.ipynb"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run(script: str, *flags: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_training_from_python(tmp_path):
    said = run("train_from_python.py", "--max-steps", "12", cwd=tmp_path).stdout
    first, last = map(float, re.search(r"loss: ([\d.]+) at the first step, ([\d.]+) at step 12\n", said).groups())
    assert last < first / 2
    assert re.search(r"held-out loss: [\d.]+\n", said)
    (adapter,) = re.findall(r"as PEFT reads it: (.+)", said)
    assert (tmp_path / adapter / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_mistake_in_python_is_one_message(tmp_path):
    said = run("train_from_python.py", "--bits", "5", cwd=tmp_path, status=2).stderr
    assert re.search(r"^error: .*bits.* = 5", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_lean_step_has_the_losses_of_the_stock_step_in_less_memory(tmp_path):
    said = run("lean_step_on_your_peft_model.py", cwd=tmp_path).stdout
    assert re.search(r"factors first +28 linear layers\n", said)
    steps = re.findall(r"^ +\d +([\d.]+) +([\d.]+)$", said, re.MULTILINE)
    assert len(steps) == 3
    assert all(abs(float(stock) - float(lean)) < 1e-4 for stock, lean in steps)
    stock_mib, lean_mib = map(float, re.search(r"([\d.]+) MiB stock, ([\d.]+) MiB lean", said).groups())
    assert lean_mib < stock_mib / 2


@pytest.mark.slow
def test_the_table_of_models_and_gpus(tmp_path):
    flags = ["--model", "llama-3.2-1b", "llama-2-70b", "--gpu", "rtx3060", "a100-80", "--seq-len", "512"]
    rows = run("plan_before_you_buy.py", *flags, "--picture", "plan.png", cwd=tmp_path).stdout.splitlines()
    assert rows[0].split() == ["rtx3060", "a100-80"]
    assert re.fullmatch(r"llama-3.2-1b +\d\.\d of 12 GiB +\d\.\d of 80 GiB", rows[1])
    assert re.fullmatch(r"llama-2-70b +\d+\.\d GiB: does not fit +\d+\.\d of 80 GiB", rows[2])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat  # here, where they are needed: other tests run without
    from nbclient import NotebookClient

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = json.loads((tmp_path / "runs" / "tutorial" / "run.json").read_text())["results"]
    assert results["exact_match_before"] == 0
    assert results["exact_match_after"] > 0.5
    report = json.loads((tmp_path / "release" / "tutorial" / "merge_report.json").read_text())
    assert report["runs"][0]["steps"] == results["steps"]
    (answer,) = notebook.cells[-2].outputs  # of stock transformers
    assert answer.text.startswith("from: Olga; to: Maria;")


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads((EXAMPLES / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert "jupyter lab examples/tutorial.ipynb" in "".join(cells[0]["source"])


def test_every_example_has_a_test_and_a_line():
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))) | {NOTEBOOK}
    listed = re.findall(r"^\| \[(\S+)\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert files == tested == set(listed)
