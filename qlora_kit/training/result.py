"""What a run leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves: its folder, the trained weights in it, and its figures."""

    folder: Path
    adapter: Path  # the model folder after `--full`
    steps: int
    train_loss: float
    eval_loss: float | None
    exact_match_before: float | None
    exact_match_after: float | None
    peak_bytes: int
    peak_phase: str  # in which that was
    phase_peak_bytes: Mapping[str, int]  # see `progress.PhasePeaks`
    paged_bytes: int  # of the optimizer's states at the end, in managed memory
    tokens_per_s: float
    metrics: Mapping[str, float]  # the task's figures on held-out data; empty without any
