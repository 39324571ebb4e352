"""What trains inside 6 and 8 GiB? Shown, not computed, where there is a GPU.

    python benchmarks/fit.py

On a GPU torch may take no more than so much memory (`torch.cuda.set_per_process_memory_fraction`), and the shape of
Llama-3.1-8B trains for 20 steps inside it: 2 x 2048 tokens in 6 GiB, and at batch 1, r = 32 the longest context in
8 GiB, searched with real steps from the planner's answer. (The CUDA context lies outside that count; the result says
how much it takes.) Without a GPU the same cases are planned only, and marked so. Writes fit_<GPU>.json or fit_cpu.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, device_name, write_result
from contenders import Job, Lean
from step import in_own_process, job_of

from qlora_kit.config.settings import RunConfig

if TYPE_CHECKING:
    from qlora_kit.memory.rules import Gpu

GIB = 1 << 30
STEPS = 20
TRIED_STEPS = 2  # enough to reach the peak, while a context is searched
FINEST_TOKENS = 256  # the search for the longest context stops here
TIGHT = {"offload_embedding": "on"}  # what `auto` chooses where memory is short


def settings(model: str, rows: int, tokens: int, r: int) -> dict[str, Any]:
    """Those of the default run of random weights, in memory that is short."""
    flat = {"model": model, "weights": "random", "bits": 4, "r": r, "batch_size": rows, "seq_len": tokens}
    return {**flat, **TIGHT}


def train_inside(job: Job, cap_bytes: int, steps: int) -> dict[str, Any]:
    """Train `steps` steps with torch's allocator held to `cap_bytes`; out of memory is an answer, not an error."""
    import torch

    device = torch.device("cuda:0")
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total_bytes, device)
    row: dict[str, Any] = {"cap_bytes": cap_bytes, "steps": steps}
    try:
        contender = Lean(job)
        row["load_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start_s = time.monotonic()
        losses = [contender.step() for _ in range(steps)]
    except torch.cuda.OutOfMemoryError:
        return {**row, "status": "does not fit"}
    if not all(map(math.isfinite, losses)):
        return {**row, "status": f"failed: losses {losses}"}
    free_bytes, _ = torch.cuda.mem_get_info(device)
    reserved_bytes = torch.cuda.max_memory_reserved(device)
    return {
        **row,
        "status": "trained",
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": reserved_bytes,
        "outside_torch_bytes": total_bytes - free_bytes - torch.cuda.memory_reserved(device),
        "step_s": (time.monotonic() - start_s) / steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def gpu_here() -> Gpu | None:
    """The GPU that is planned for: the present one, where there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = in_own_process(_present)  # so that no context of this process takes its memory
    if "gpu" not in found:
        raise RuntimeError(f"the present GPU: {found['status']}")
    gpu: Gpu = found["gpu"]
    return gpu


def _present() -> dict[str, Any]:
    from qlora_kit.memory.fit import present_device

    return {"gpu": present_device()[0]}


def planned(flat: dict[str, Any], gpu: Gpu | None) -> dict[str, Any]:
    """What the plan says of the run `flat` on `gpu`, by default one of compute capability 8."""
    from qlora_kit.memory.plan import plan

    found = plan(RunConfig.from_flat(flat), gpu=gpu)
    planned_for = "compute capability 8.0" if gpu is None else gpu.name
    peak = {"predicted_peak_bytes": found.peak_bytes, "phase": found.phase, "components": found.components}
    return {"planned_for": planned_for, **peak}


def longest_planned(model: str, r: int, cap_bytes: int, gpu: Gpu | None) -> int:
    """The longest context at batch 1 whose planned peak is within `cap_bytes`, a multiple of `FINEST_TOKENS`."""
    from qlora_kit.memory.fit import largest

    def need_bytes(units: int) -> int:
        found: int = planned(settings(model, 1, units * FINEST_TOKENS, r), gpu)["predicted_peak_bytes"]
        return found

    from qlora_kit.memory.plan import resolve_architecture

    shortest = RunConfig.from_flat(settings(model, 1, FINEST_TOKENS, r))
    positions = resolve_architecture(shortest).max_position_embeddings
    return largest(need_bytes, cap_bytes, 1, positions // FINEST_TOKENS + 1) * FINEST_TOKENS


def longest_trained(model: str, r: int, cap_bytes: int, guess: int) -> int:
    """The longest context that really trains, by bisection around `guess`; 0 where none does."""

    def trains(units: int) -> bool:
        job = job_of("lean", settings(model, 1, units * FINEST_TOKENS, r), "cuda")
        return bool(in_own_process(train_inside, job, cap_bytes, TRIED_STEPS)["status"] == "trained")

    low, high = 0, max(guess // FINEST_TOKENS, 1)
    while trains(high):
        low, high = high, high + max(high // 8, 1)
    if not low and trains(high // 2):
        low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return low * FINEST_TOKENS


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Both cases: trained where there is a GPU, planned everywhere."""
    gpu = gpu_here()
    batch = settings(args.model, 2, 2048, 16)
    small, large = args.small_gib * GIB, args.large_gib * GIB
    context = longest_planned(args.model, 32, large, gpu)
    if gpu is not None:
        context = longest_trained(args.model, 32, large, context)
    longest = settings(args.model, 1, context, 32)
    rows = []
    for name, flat, cap in (("batch 2 x 2048, r = 16", batch, small), ("longest context, r = 32", longest, large)):
        row = {"case": name, "tokens": flat["seq_len"], "cap_bytes": cap, **planned(flat, gpu)}
        if gpu is not None:
            row |= in_own_process(train_inside, job_of("lean", flat, "cuda"), cap, STEPS)
        else:
            row |= {"status": "planned: not yet measured on a GPU", "fits": row["predicted_peak_bytes"] <= cap}
        print(row, file=sys.stderr)
        rows.append(row)
    return {"model": args.model, "rows": rows}


def main() -> int:
    """Run both cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="the shape of Llama-3-8B with 131,072 positions")
    parser.add_argument("--small-gib", type=int, default=6)
    parser.add_argument("--large-gib", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    args = parser.parse_args()
    file = write_result("fit", collect(args), args.out)
    print(f"on {device_name()}, written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
