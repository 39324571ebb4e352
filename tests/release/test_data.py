"""A run on real data from its first step to its release: GSM8K on a small pretrained GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from releases import QUIET
from transformers import GPT2LMHeadModel

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, train
from qlora_kit.release import merge
from qlora_kit.release.proof import live_side, release_side, verify
from qlora_kit.release.request import MergeRequest

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_data) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for name, count in (("train", 24), ("test", 6)):
        lines = (shared_data / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]), encoding="utf-8")
    config = RunConfig(
        base=BaseConfig(model=str(shared_data / "small-gpt2"), device="cpu"),
        adapter=AdapterConfig(r=8),
        data=DataConfig(data=str(folder / "train.jsonl"), eval_data=str(folder / "test.jsonl"), seq_len=96),
        optim=OptimConfig(lr=2e-3, max_steps=6, batch_size=2),
        out=str(folder / "run"),
        preflight=False,
    )
    train(config, QUIET)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_release_of_a_gsm8k_run(run, tmp_path, monkeypatch, dtype):
    def in_this_process(sides: verify.Sides) -> None:
        live_side.main(sides.job)
        (sides.folder / "trained").mkdir()
        release_side.main(sides.releases["trained"], sides.folder / live_side.ROWS_FILE, sides.folder / "trained")

    monkeypatch.setattr(verify.Sides, "run", in_this_process)
    monkeypatch.setattr(verify, "MAX_TOKENS", 256)
    settings = json.loads((run / "run.json").read_text())["settings"]
    request = MergeRequest(
        base=BaseConfig(**settings["base"]),
        adapters=((str(run / "adapter"), 1.0),),
        run=str(run),
        out=str(tmp_path / "out"),
        dtype=dtype,
        data=DataConfig(**settings["data"]),
    )
    found = merge.merge(request, QUIET).report["proof"]["model"]
    assert "test.jsonl" in found["source"]
    assert found["answer"]["same"]
    assert found["answer"]["release"]
    if dtype == "fp32":
        assert found["exact"]["relative_max"] < 1e-4
    else:
        assert found["exact"]["relative_max"] <= 1.25 * found["rounding"]["relative_max"]
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
