"""The phases, in the order of what they teach; a later one adds itself here, its promise in `promises.py`.

The seconds are guesses until a run was recorded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence

from gpu.runner import Phase

MODELS = ("gpt2", "opt-125m", "pythia-410m", "qwen2.5-0.5b", "llama-3.2-1b")  # of the planner's accuracy
ROOM_BYTES = 96 << 30  # for all phases that run at once: full fine-tuning of 1.2 billion parameters takes 20
LLAMA, GPT2 = "llama-3-8b:2x2048", "gpt2-large:8x1024"
# Consumer cards take flash attention, which the planner counts with; Hopper would take cuDNN's.
CONSUMER = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
HOPPER = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}


def phases(rehearsal: bool, capability: Sequence[int] = (9, 0), memory_bytes: int | None = None) -> list[Phase]:
    """Every phase that this machine can run, for a GPU of `capability`, or on a CPU with tiny shapes.

    On a GPU of less than `ROOM_BYTES` none run at once.
    """
    found = [*_in_parallel(), *_alone()]
    if memory_bytes is not None and memory_bytes < ROOM_BYTES:
        found = [dataclasses.replace(phase, together=False) for phase in found]
    if tuple(capability) < (9, 0):
        found = [phase for phase in found if phase.name != "speed-cudnn"]
    if importlib.util.find_spec("unsloth") is None and not rehearsal:
        found = [phase for phase in found if "unsloth" not in phase.name]
    return [_rehearsed(phase) for phase in found] if rehearsal else found


def _in_parallel() -> list[Phase]:
    """Correctness and memory: bytes are exact whatever else runs."""
    models = [_phase(f"planner-{m}", f"plan and peak of {m}", "planner", [m], 80, 170) for m in MODELS]
    return [
        _phase("tests", "the tests that need a GPU", "tests", [], 120, 170, together=True),
        _phase("fit-6gib", "llama-3.1-8b, 2 x 2048, inside 6 GiB", "fits", ["6gib"], 60, 170, together=True),
        _phase("fit-8gib", "llama-3.1-8b, 1 x 32,768, r = 32, inside 8 GiB", "fits", ["8gib"], 90, 170, together=True),
        *models,
    ]


def _alone() -> list[Phase]:
    """What is timed, and what kills and resumes: nothing runs beside them."""
    return [
        _phase("speed-llama", f"{LLAMA}, ours and stock", "speed", [LLAMA, "lean,stock"], 75, 140, together=False),
        _phase("speed-gpt2", f"{GPT2}, ours and stock", "speed", [GPT2, "lean,stock"], 60, 110, together=False),
        _phase("kernels", f"one step of {LLAMA} under the profiler", "kernels", [LLAMA], 35, 60, together=False),
        _phase("real-run", "train, kill, resume, evaluate, merge, prove", "real_run", [], 80, 170, together=False),
        _phase("paging", "memory of paged states, alone on the device", "tests", ["--alone"], 20, 45, together=False),
        _phase("speed-peft", f"{LLAMA}, a plain PEFT loop", "speed", [LLAMA, "peft-loop"], 35, 60, together=False),
        _phase("speed-unsloth", f"{LLAMA}, Unsloth", "speed", [LLAMA, "unsloth"], 60, 90, together=False),
        _phase("speed-cudnn", f"{LLAMA}, ours with cuDNN's attention", "speed", [LLAMA, "lean"], 35, 50, False, HOPPER),
        _phase("ablation", f"{LLAMA}, one piece off in turn", "ablation", [LLAMA], 30, 600, together=False),
    ]


def _phase(
    name: str,
    teaches: str,
    script: str,
    arguments: Sequence[str],
    estimate_s: float,
    limit_s: float,
    together: bool = True,
    environment: dict[str, str] = CONSUMER,
) -> Phase:
    command = (sys.executable, "-W", "ignore", "-m", f"gpu.{script}", *arguments)
    return Phase(name, teaches, command, estimate_s, limit_s, together, environment)


def _rehearsed(phase: Phase) -> Phase:
    """The same phase on a CPU, tiny."""
    environment = {**phase.environment, "CUDA_VISIBLE_DEVICES": ""}
    return Phase(phase.name, phase.teaches, (*phase.command, "--tiny"), 10, 240, phase.together, environment)
