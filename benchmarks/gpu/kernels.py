"""One step of ours under torch's profiler: what is launched, how long the GPU is busy, and with what."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from gpu.speed import case_of

SHOWN = 25  # kernels, those that take the most
WARM_UP = 3


def profiled(contender: Any) -> dict[str, Any]:
    """The row of one step; on a CPU operators stand for kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for _ in range(WARM_UP):
        contender.step()
    start_s = time.monotonic()
    contender.step()  # it waits for the device
    plain_s = time.monotonic() - start_s
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        start_s = time.monotonic()
        contender.step()
        wall_s = time.monotonic() - start_s
    kernels = record.key_averages()
    busy_s = sum(getattr(kernel, time_of) for kernel in kernels) / 1e6
    most = sorted(kernels, key=lambda kernel: -getattr(kernel, time_of))[:SHOWN]
    return {
        "step_s": plain_s,
        "wall_s": wall_s,
        "busy_s": busy_s,
        "busy_share": busy_s / plain_s,  # the profiler makes launching slower, not the kernels
        "launches": sum(kernel.count for kernel in kernels if "LaunchKernel" in kernel.key),
        "kernels": [
            {"name": kernel.key[:120], "count": kernel.count, "ms": round(getattr(kernel, time_of) / 1e3, 3)}
            for kernel in most
        ],
    }


def main() -> int:
    """Print the row."""
    from contenders import Lean

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    case = case_of(args.case, args.tiny)
    with case.described() as folder:
        contender = Lean(case.job("lean", folder, "cpu" if args.tiny else "cuda"))
        row = profiled(contender)
    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
