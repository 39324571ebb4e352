"""The benchmark of the step, end to end on a tiny case, and what it shares with the others."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny

from qlora_kit.config.settings import BaseConfig
from qlora_kit.memory.rules import Gpu
from qlora_kit.model import load, source

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import contenders  # noqa: E402
import fit  # noqa: E402
import readme  # noqa: E402
import step  # noqa: E402

CPU = torch.device("cpu")
HERE = ("stock", "peft-loop", "lean")


@pytest.fixture
def jobs(tmp_path):
    save_tiny(tmp_path / "base", "llama")
    (tmp_path / "base" / "model.safetensors").unlink()  # drawn, not read
    flat = step.Case("tiny", 2, 24, 4).flat(tmp_path / "base", optim="adamw", lr=1e-2)
    return {name: step.job_of(name, flat, "cpu") for name in HERE}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # plain, transposed and tied layers
def test_a_peer_loads_the_same_weights_by_its_own_means(tmp_path, family):
    FAMILIES[family]().save_pretrained(tmp_path)
    peer = contenders.Stock.__new__(contenders.Stock)
    peer.job = step.job_of("stock", step.Case("tiny", 1, 8).flat(tmp_path), "cpu")
    peer.device = CPU
    theirs = dict(peer.base().named_parameters())
    ours = dict(
        load.load_base(BaseConfig(model=str(tmp_path), weights="random"), CPU, peer.job.seed).named_parameters()
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_contenders_step_in_turn_train_alike_and_one_that_fails_says_how(jobs):
    broken = dataclasses.replace(jobs["peft-loop"], folder="/nowhere")
    seen = []
    step.steps_in_turn({**jobs, "broken": broken}, 6, 1, lambda found: seen.append(found))
    assert len(seen) == 6  # each round is known as soon as it is over
    rows = seen[-1]
    assert list(rows) == [*HERE, "broken"]
    failed = rows.pop("broken")["status"]
    assert failed.startswith("failed: ")
    assert "/nowhere" in failed
    assert {row["status"] for row in rows.values()} == {"ok"}  # of peers: nothing of ours was imported, or it raises
    assert {row["steps"] for row in rows.values()} == {7}
    assert len({row["trained"] for row in rows.values()}) == 1
    stock = rows["stock"]
    for row in rows.values():
        assert row["first_loss"] == pytest.approx(stock["first_loss"], rel=2e-3)
        assert row["first_loss"] - row["loss"] == pytest.approx(stock["first_loss"] - stock["loss"], rel=0.05)
        assert row["step_s"] > 0
        assert row["resident_bytes"] > row["libraries_bytes"] > 0
    assert stock["loss"] < stock["first_loss"]


def test_no_setting_of_the_allocator_reaches_a_contender():
    settings = {"MALLOC_MMAP_THRESHOLD_": "1", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1", "LD_PRELOAD": "x.so"}
    assert step.plain({**settings, "PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_peer_has_nothing_of_ours(jobs):
    with pytest.raises(AssertionError, match="nothing of ours"):
        step._measured(jobs["stock"], None, [{"loss": 1.0, "seconds": 1.0, "ours": True}], 0)


def test_a_result_is_a_file_from_the_first_row_on(tmp_path):
    result = step.Result("step", tmp_path / "new" / "out", {"peaks": "measured"})
    case = dataclasses.asdict(step.Case.parse("llama-12x768:4x512"))
    result.add("one", [{"case": case, "contender": "stock", "status": "ok", "step_s": 2.0}])
    result.add("two", [{"case": case, "contender": "lean", "status": "failed: RuntimeError: no"}])
    found = json.loads(result.file.read_text())
    assert [row["contender"] for row in found["rows"]] == ["stock", "lean"]
    assert {"commit", "device", "versions", "date", "peaks"} <= found.keys()
    assert "failed: RuntimeError: no" in result.file.with_suffix(".md").read_text()


def test_a_named_shape_of_its_own_is_described_for_everybody(tmp_path):
    with step.Case.parse("llama-12x768:4x512").described() as folder:
        found = source.load_model_config(BaseConfig(model=str(folder), weights="random"))
    assert (found.num_hidden_layers, found.hidden_size, found.vocab_size) == (12, 768, 32000)


def test_the_readme_has_what_was_measured(tmp_path):
    case = {"model": "llama-12x768", "rows": 4, "tokens": 512, "r": 16}
    rows = [
        {"step_s": 8.0, "tokens_per_s": 256.0, "tokens_per_s_of_stock": 1.0, "live_bytes_of_stock": 1.0},
        {"step_s": 4.0, "tokens_per_s": 512.0, "tokens_per_s_of_stock": 2.0, "live_bytes_of_stock": 0.5},
    ]
    for name, row in zip(("stock", "lean"), rows, strict=True):
        row |= {"case": case, "contender": name, "status": "ok", "resident_bytes": 2 * 10**9, "libraries_bytes": 10**9}
    failed = {"case": case, "contender": "peft-loop", "status": "failed: RuntimeError: no"}
    versions = dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1")
    where = {"device": "CPU, 2 cores", "versions": versions, "commit": "c", "date": "d"}
    said = readme.times({**where, "rows": [*rows, failed]})
    assert "| qlora_kit | 4.00 | 512 | 2.00 | 0.50 | 1.00 |" in said
    assert "| plain PEFT loop | failed: RuntimeError: no |" in said


# --------------------------------------------------------------------------- faults of the benchmarks


def test_a_commit_is_known_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    monkeypatch.delenv("QLORA_KIT_COMMIT", raising=False)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.commit() == "unknown"
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert common.commit() == "abc1234"
    monkeypatch.setenv("QLORA_KIT_COMMIT", "def5678")
    assert common.commit() == "def5678"


def test_a_commit_is_known_outside_a_repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("QLORA_KIT_COMMIT", "def5678")
    assert common.commit() == "def5678"


def test_what_does_not_fit_unsloth_is_said_in_a_line(tmp_path, monkeypatch, jobs):
    info = tmp_path / "unsloth-2026.10.9.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        "Name: unsloth",
        "Version: 2026.10.9",
        "Requires-Dist: transformers<=5.0.0,>=4.52.4",
        "Requires-Dist: datasets<3",
        "Requires-Dist: peft>=0.18",
        'Requires-Dist: peft<0.1; extra == "old"',
        "Requires-Dist: no-such-package>=1",
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    assert contenders.unsloth_problem("no-such-package") == "no-such-package is not installed"
    monkeypatch.syspath_prepend(tmp_path)
    said = contenders.unsloth_problem()
    assert said is not None
    assert said.count("\n") == 0
    assert said.startswith("unsloth 2026.10.9 needs transformers<=5.0.0,>=4.52.4 (here ")
    assert f"datasets<3 (here {metadata.version('datasets')})" in said
    assert "no-such-package (not installed)" in said
    assert "peft" not in said
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = step.Child(dataclasses.replace(jobs["stock"], name="unsloth"))
    child.end()
    assert child.built["status"] == f"failed: ImportError: {said}"[: len(child.built["status"])]
    assert len(child.built["status"]) > 60


def test_what_is_read_from_files_can_be_given_as_weights(tmp_path):
    """How Unsloth, which wants a folder, gets weights that are in none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    FAMILIES["llama"]().save_pretrained(tmp_path)
    architecture = AutoConfig.from_pretrained(tmp_path)
    kind, weights = contenders.drawn_weights(architecture, CPU, 0, torch.bfloat16)
    with contenders._weights_for_files(kind, architecture, weights):
        model = AutoModelForCausalLM.from_pretrained(
            str(tmp_path), device_map={"": "cpu"}, max_position_embeddings=256, dtype=torch.bfloat16
        )
    assert model.config.max_position_embeddings == 256
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_fit_is_planned_for_the_gpu_that_is_given(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    flat = fit.settings(str(tmp_path), 2, 64, 4)
    without, old = fit.planned(flat, None), fit.planned(flat, Gpu("T4", 16 << 30, (7, 5)))
    assert (without["planned_for"], old["planned_for"]) == ("compute capability 8.0", "T4")
    assert old["predicted_peak_bytes"] != without["predicted_peak_bytes"]  # fp16 with fp32 factors, no flash attention
    assert (fit.gpu_here() is None) == (not torch.cuda.is_available())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures CUDA where there is one")
def test_the_whole_command_on_a_tiny_case(tmp_path, monkeypatch):
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    case = f"{tmp_path}:1x16"
    words = ["step.py", "--cases", case, "--cpu-cases", case, "--rounds", "1", "--contenders", "stock,lean,unsloth"]
    monkeypatch.setattr(sys, "argv", [*words, "--name", "tried", "--out", str(tmp_path / "out")])
    with warnings.catch_warnings():
        assert step.main() == 0
    simulated, measured = (
        json.loads((tmp_path / "out" / f"{name}_cpu.json").read_text()) for name in ("tried", "tried_times")
    )
    assert [(row["contender"], row["status"]) for row in simulated["rows"]] == [
        ("stock", "ok"),
        ("lean", "ok"),
        ("unsloth", step.NO_GPU),
    ]
    assert [row["contender"] for row in measured["rows"]] == ["stock", "lean"]
    assert measured["rows"][1]["tokens_per_s_of_stock"] > 0
    assert measured["rows"][1]["live_bytes"] > 0
