"""The metric of a finished run, and the combination chosen by it: the one-standard-error rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.search.space import Point, label_of

LOWER_IS_BETTER = ("loss", "perplexity")  # endings of metrics; every other metric is better when higher
NO_METRICS = (  # not of held-out data
    "steps",
    "train_loss",
    "peak_bytes",
    "phase_peak_bytes",
    "tokens_per_s",
    "exact_match_before",
)
FINISHED, RUNNING, WAITING, RULED_OUT = "finished", "running", "waiting", "ruled out"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A combination and its results.

    `values` are the metric of each fold so far, in order; `state` is FINISHED, RUNNING, WAITING, or the reason why
    there is no figure. `trainable` counts parameters and `device_bytes` is the memory planned for a GPU, both None if
    unknown.
    """

    point: Point
    rank: int
    state: str
    values: tuple[float, ...] = ()
    trainable: int | None = None
    device_bytes: int | None = None

    @property
    def label(self) -> str:
        return label_of(self.point)

    @property
    def is_finished(self) -> bool:
        return self.state == FINISHED

    @property
    def is_open(self) -> bool:
        return self.state in (RUNNING, WAITING)

    @property
    def is_ruled_out(self) -> bool:
        return self.state.startswith(RULED_OUT)

    @property
    def mean(self) -> float:
        """The cross-validated figure."""
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float:
        """That of the mean over the folds: s / √k, with s over k − 1."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values))


def higher_is_better(metric: str) -> bool:
    """The direction of `metric`: a loss or a perplexity is better lower, everything else higher."""
    return not metric.endswith(LOWER_IS_BETTER)


def reported(results: Mapping[str, Any]) -> dict[str, float]:
    """Every number on held-out data in `results` (of a `run.json`), by name; nested ones by their inner name."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if name in NO_METRICS:
            continue
        if isinstance(value, Mapping):
            found.update(reported(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def metric_of(results: Mapping[str, Any], metric: str) -> float | None:
    """The value of `metric` in `results`: "loss" stands for eval_loss, "exact_match" for that after training.

    None where the run does not report it.
    """
    found = reported(results)
    names = (metric, f"eval_{metric}", f"{metric}_after")
    return next((found[name] for name in names if name in found), None)


def best_of(tried: Iterable[Tried], higher: bool) -> Tried:
    """The finished combination with the best mean."""
    return max(_finished(tried), key=lambda one: one.mean if higher else -one.mean)


def choose(tried: Sequence[Tried], higher: bool) -> Tried:
    """The smallest rank whose mean is within one standard error of the best mean; of equal ranks the better mean.

    The standard error is that of the best combination. Source: Hastie, Tibshirani, Friedman, The Elements of
    Statistical Learning, §7.10 ("one-standard-error rule").
    """
    best = best_of(tried, higher)
    near = [one for one in _finished(tried) if abs(one.mean - best.mean) <= best.standard_error]
    return min(near, key=lambda one: (one.rank, -one.mean if higher else one.mean))


def _finished(tried: Iterable[Tried]) -> list[Tried]:
    return [one for one in tried if one.is_finished]
