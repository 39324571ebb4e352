"""What only a CUDA device can show: paging, peak memory from the allocator, and the same losses as on a CPU."""

from __future__ import annotations

import dataclasses
import io
import json
from statistics import fmean

import pytest
import torch
from families import FAMILIES, save_tiny
from rich.console import Console

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, train

pytestmark = pytest.mark.gpu
STEPS = 4  # of an epoch


@pytest.fixture
def config(tmp_path) -> RunConfig:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(16)))
    return RunConfig(
        base=BaseConfig(model=str(save_tiny(tmp_path / "base", "llama")), device="cuda"),
        adapter=AdapterConfig(r=64),
        data=DataConfig(data=str(data), seq_len=32),
        optim=OptimConfig(max_steps=STEPS),
        out=str(tmp_path / "run"),
    )


def losses(result) -> list[float]:
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def test_the_default_run_trains_and_reports_allocated_memory(config):
    optim = OptimConfig(lr=5e-3, schedule="constant", max_steps=4 * STEPS)
    result = train(dataclasses.replace(config, optim=optim), Console(file=io.StringIO()))
    record = json.loads((result.folder / "run.json").read_text())
    assert record["resolved"]["optim"] == "paged_adamw_8bit"
    peaks = result.phase_peak_bytes  # torch's own count is begun anew with each phase
    assert 0 < torch.cuda.memory_allocated() <= result.peak_bytes == max(peaks.values()) == peaks[result.peak_phase]
    assert {"loading", "step"} <= peaks.keys()
    first, last = (fmean(losses(result)[part]) for part in (slice(STEPS), slice(-STEPS, None)))
    assert last < first  # each of the same examples: a batch alone may be harder than another


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_every_family_trains_at_every_number_of_bits(config, tmp_path, family, bits):
    base = BaseConfig(model=str(save_tiny(tmp_path / family, family)), bits=bits, device="cuda")
    result = train(
        RunConfig(base=base, data=config.data, optim=OptimConfig(max_steps=2), out=config.out),
        Console(file=io.StringIO()),
    )
    assert all(value > 0 for value in losses(result))
