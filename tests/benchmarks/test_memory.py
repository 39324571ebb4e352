"""The benchmark of memory, end to end on one tiny case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_cases import small_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import memory  # noqa: E402


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(small_config("gpt2").to_dict()))
    return str(path)


@pytest.mark.parametrize(
    ("device", "place"), [("CPU, 2 cores, x86_64", "cpu"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3")]
)
def test_one_gpus_result_does_not_overwrite_anothers(device, place):
    assert common.place_of(device) == place


@pytest.mark.slow
def test_one_tiny_case_from_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr("common.RESULTS", tmp_path / "results")
    arguments = ["--models", model, "--methods", "qlora4,lora16", "--batch", "2", "--seq", "32", "--measure-cpu", model]
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments, "--cpu-seq", "96"])
    monkeypatch.setattr(memory, "RESULTS", tmp_path / "results")
    assert memory.main() == 0
    (file,) = (tmp_path / "results").glob("memory_*.json")
    result = json.loads(file.read_text())
    assert {"commit", "device", "versions", "date", "settings", "rows"} <= result.keys()
    row, _ = result["rows"]
    assert row["predicted_peak_bytes"] == sum(row["predicted_components"].values())
    table = file.with_suffix(".md").read_text()
    assert "QLoRA, 4 bits" in table
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    if not torch.cuda.is_available():
        assert "not yet validated on hardware" in table
        quantized, measured = result["cpu_rows"]
        assert quantized["status"] == measured["status"] == "measured"
        assert abs(measured["error"]) < 0.15  # of AdamW: a CPU's 8-bit one makes copies that are not predicted


@pytest.mark.slow
def test_a_case_that_fails_is_a_row_that_says_so(tmp_path):
    row = memory.in_own_process(memory.Case(str(tmp_path / "absent"), "qlora4", 1, 8), timeout_s=120)
    assert row["status"].startswith("failed: ")
    assert "absent" in row["status"]
    assert "live_peak_bytes" not in row


def test_a_case_that_takes_too_long_is_a_row_too(model):
    row = memory.in_own_process(memory.Case(model, "qlora4", 1, 8), timeout_s=0.1)
    assert row["status"] == "failed: not done in 0 s"


def test_a_failed_row_stands_in_the_table():
    rows = [{"model": "m", "method": "full", "batch": 1, "seq": 8, "status": "does not fit: out of memory"}]
    settings = {"r": 16, "gradient_checkpointing": True}
    where = {"device": "a GPU", "versions": {"torch": "2"}, "commit": "c", "date": "d"}
    assert "does not fit: out of memory" in memory.markdown({**where, "settings": settings, "rows": rows})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs only where there is no GPU")
def test_the_accuracy_benchmark_says_that_it_needs_a_gpu():
    command = [sys.executable, str(BENCHMARKS / "planner_accuracy.py")]
    before = sorted((BENCHMARKS / "results").glob("*"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("not yet validated on hardware: needs a CUDA device")
    assert sorted((BENCHMARKS / "results").glob("*")) == before
