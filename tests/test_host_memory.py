from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit import host_memory

# Frees blocks of 2 MiB, each held open by a small one behind it, after a larger free has raised glibc's threshold.
PROGRAM = """
import sys
from pathlib import Path
import torch
from qlora_kit.host_memory import return_large_blocks
if sys.argv[1] == "told":
    assert return_large_blocks()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
torch.empty(30 << 20, dtype=torch.uint8)
before = resident()
large, small = [], []
for _ in range(60):
    large.append(torch.ones(2 << 20, dtype=torch.uint8))
    small.append(torch.ones(100 << 10, dtype=torch.uint8))  # too large for the holes that imports leave
large.clear()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_go_back_to_the_system_when_told_and_not_otherwise():
    root = str(Path(__file__).resolve().parents[1])
    kept = {}
    for mode in ("told", "untold"):
        command = [sys.executable, "-c", PROGRAM, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": root})
        kept[mode] = int(done.stdout)
    assert kept["told"] < 20 << 20
    assert kept["untold"] > 100 << 20


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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/meminfo")
def test_this_machine_tells():
    assert 0 < host_memory.available_bytes() < 1 << 50
