"""`qlora-kit merge` as a user types it, with its proof in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import save_tiny
from releases import QUIET

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, train

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of a few steps on a tiny GPT-2, in a folder with its base beside it, all paths typed relative to it."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    save_tiny(folder / "base", "gpt2")
    lines = [json.dumps({"prompt": f"add {i}", "completion": f"{2 * i + 1}"}) for i in range(12)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    config = RunConfig(
        base=BaseConfig(model="base", device="cpu"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data="train.jsonl", eval_fraction=0.25, seq_len=64),
        optim=OptimConfig(lr=2e-2, max_steps=4),
        out="run",
        preflight=False,
    )
    try:
        train(config, QUIET)
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
def test_the_command_releases_a_run_in_processes_of_its_own(finished, tmp_path):
    """As a user types it, with relative paths: no other path of this machine is in what is written."""
    script = str(ROOT / "scripts" / "merge.py")
    words = ["--run", "run", "--out", "release/x"]
    done = subprocess.run(
        [sys.executable, script, *words], cwd=finished, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loaded by stock transformers as GPT2LMHeadModel" in done.stdout
    assert "the greedy answer is the same text" in done.stdout
    out = finished / "release" / "x"
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert "quantization_config" not in config
    report = json.loads((out / "merge_report.json").read_text())
    assert "--run run" in report["command"]
    for file in out.iterdir():
        assert str(finished).encode() not in file.read_bytes()
    assert [file.name for file in out.parent.iterdir()] == ["x"]


@pytest.mark.slow
def test_interrupting_the_proof_ends_its_processes_and_leaves_nothing(finished, tmp_path):
    out = tmp_path / "new" / "out"
    command = [sys.executable, "-m", "qlora_kit", "merge", "--run", "run", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=finished, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline_s = time.monotonic() + 120
    while not (out.parent / "out.merging" / "proof" / "0.log").exists():
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert not out.parent.exists()
    while is_anyone_left(process.pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_anyone_left(session: int) -> bool:
    """Whether a process of the session still runs (a zombie, which nobody fetched, does not)."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(file.read_text().rpartition(")")[2].split())
    return any(int(fields[3]) == session and fields[0] != "Z" for fields in stats)
