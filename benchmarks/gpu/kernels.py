"""One step of ours under torch's profiler: what is launched, how long the GPU is busy, and with what."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from gpu.speed import case_of

SHOWN = 25  # kernels, those that take the most
WARM_UP = 3


def profiled(contender: Any) -> dict[str, Any]:
    """The row of one step; on a CPU operators stand for kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    for _ in range(WARM_UP):
        contender.step()
    start_s = time.monotonic()
    contender.step()  # it waits for the device
    plain_s = time.monotonic() - start_s
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        start_s = time.monotonic()
        contender.step()
        wall_s = time.monotonic() - start_s
    events = record.key_averages()
    return {
        "step_s": plain_s,
        "wall_s": wall_s,
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
        **busy(kernels_of(events) if on_gpu else events, "device" if on_gpu else "cpu", plain_s),
    }


def kernels_of(events: Iterable[Any]) -> list[Any]:
    """Those that ran on the GPU: an operator of the CPU carries the time of the kernels that it launched once more."""
    from torch.autograd import DeviceType

    return [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]


def busy(kernels: Iterable[Any], kind: str, plain_s: float) -> dict[str, Any]:
    """How long `kernels` took, by themselves and of a step without the profiler, which slows launching alone."""
    times_us = [(getattr(kernel, f"self_{kind}_time_total"), kernel) for kernel in kernels]
    busy_s = sum(time_us for time_us, _ in times_us) / 1e6
    most = sorted(times_us, key=lambda pair: -pair[0])[:SHOWN]
    shown = [{"name": k.key[:120], "count": k.count, "ms": round(time_us / 1e3, 3)} for time_us, k in most]
    return {"busy_s": busy_s, "busy_share": busy_s / plain_s, "kernels": shown}


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
