from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.system import host_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator, /proc")

# Frees blocks of 2 MiB, each held open by a small one behind it, after a larger free has raised glibc's threshold.
KEPT = """
import contextlib, sys
from pathlib import Path
import torch
from qlora_kit.system.host_memory import BUILDING, apply, building
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
around = contextlib.ExitStack()
if sys.argv[1] == "told":
    assert apply(BUILDING)
elif sys.argv[1] == "nested":
    around.enter_context(building())
    with building():
        pass
elif sys.argv[1] == "built":
    with building():
        pass
torch.empty(30 << 20, dtype=torch.uint8)
before = resident()
large, small = [], []
for _ in range(60):
    large.append(torch.ones(2 << 20, dtype=torch.uint8))
    small.append(torch.ones(100 << 10, dtype=torch.uint8))  # too large for the holes that imports leave
large.clear()
kept = resident() - before
with building():
    print(kept, resident() - before)
"""

# Page faults of a step on a model whose activations have 1 to 16 MiB, after two that find the heap's size; losses.
STEPS = """
import contextlib, resource, sys
import torch
from transformers import LlamaConfig
from memory_cases import cpu_optimizer, real_batch, settings
from qlora_kit import build
from qlora_kit.system import host_memory
from qlora_kit.memory.simulate import run_step
from qlora_kit.memory.track import MemoryTracker
shape = LlamaConfig(vocab_size=640, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
for lean in ("on", "off"):
    config = settings(bits=4, adapter_dtype="bf16", lean=lean, batch_size=8, seq_len=512)
    with host_memory.building() if sys.argv[1] == "still building" else contextlib.nullcontext():
        torch.manual_seed(0)
        built = build.build_model(config, torch.device("cpu"), shape)
        model = built.model.train()
        optimizer = cpu_optimizer(built, config)
        batches = [real_batch(config, 640)]
        losses = []
        model.register_forward_hook(lambda module, args, output: losses.append(output["loss"].item()))
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run_step(MemoryTracker("cpu"), built, optimizer, batches, 1.0)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults, *[loss.hex() for loss in losses])
"""


def run_program(program: str, *arguments: str) -> list[list[str]]:
    """The words that `program` prints, line by line, in a process that no setting from outside reaches."""
    here = Path(__file__).resolve().parents[1]
    environment = {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_freed_blocks_go_back_to_the_system_when_told_and_not_otherwise():
    kept = {mode: [int(n) for n in run_program(KEPT, mode)[0]] for mode in ("told", "nested", "untold", "built")}
    assert kept["told"][0] < 20 << 20
    assert kept["nested"][0] < 20 << 20  # the end of the inner one is not that of the outer one
    assert kept["untold"][0] > 100 << 20
    assert kept["built"][0] > 100 << 20  # what runs keeps its blocks
    assert kept["built"][1] < 20 << 20  # until the next model is built


@pytest.mark.slow
def test_a_step_maps_nothing_anew_and_has_the_same_loss():
    for running, building in zip(run_program(STEPS, "built"), run_program(STEPS, "still building"), strict=True):
        assert running[1:] == building[1:]  # bit for bit
        assert len(running) == 1 + 3
        assert int(running[0]) < int(building[0]) / 10  # of more than a hundred thousand


def test_a_model_on_a_gpu_leaves_the_host_alone():
    broken = "from qlora_kit.system import host_memory\nhost_memory.apply = None\n"
    program = broken + "with host_memory.building('cuda'): print(1)"
    assert run_program(program) == [["1"]]


def test_what_is_available_is_what_the_system_and_the_container_leave(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  16000 kB\nMemAvailable:   9000 kB\nHugePages_Total:  0\n")
    assert host_memory._meminfo_bytes(meminfo) == 9000 * 1024
    assert host_memory._meminfo_bytes(tmp_path / "none") is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 20\n")
    for limit, left in (("1000\n", 400), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        assert host_memory._container_bytes(tmp_path) == left
    assert host_memory._container_bytes(tmp_path / "none") is None


def test_this_machine_tells():
    assert 0 < host_memory.available_bytes() < 1 << 50
