"""What a search found as a picture: the metric against trainable parameters and against memory."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.search.choice import Tried, higher_is_better
from qlora_kit.search.result import SearchResult
from qlora_kit.system.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "results.png"
MIB, GIB = 1 << 20, 1 << 30
COLOURS = ("#332288", "#E07B2F", "#117733", "#AA4499", "#0A6AA8", "#882255", "#2A9D8F", "#7A6A00")  # after Tol's muted
GREY, NO_LABEL = "#777777", "_nolegend_"  # where there are more series than colours
APART = 0.02  # of the axis: how far the series stand from each other, so that none hides another
WIDE = 10  # losses that differ by more than this factor are drawn on a logarithmic axis
MARKED: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none"}


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Where combinations stand on an axis: at `value`, moved a little by series so that none hides another."""

    value: Callable[[Tried], float]
    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, finished: Sequence[Tried], value: Callable[[Tried], float], is_log: bool) -> _Scale:
        values = [value(one) for one in finished]
        return cls(value=value, low=min(values), high=max(values), is_log=is_log)

    def x(self, one: Tried, index: int, n_series: int) -> float:
        """The place of `one`, which belongs to the series `index` of `n_series`."""
        moved = (index - (n_series - 1) / 2) * APART
        if self.is_log:
            return self.value(one) * math.pow(self.high / self.low if self.high > self.low else 2.0, moved)
        return self.value(one) + (self.high - self.low or 0.1 * self.high) * moved


def write_picture(result: SearchResult) -> None:
    """Draw `result` into its folder, whole or not at all."""
    write_bytes(result.folder / PICTURE_FILE, draw(result))


def draw(result: SearchResult) -> bytes:
    """The picture of `result` as PNG: means with their standard errors, and the folds behind them."""
    from matplotlib.figure import Figure

    finished = [one for one in result.tried if one.is_finished]
    has_memory = all(one.device_bytes is not None for one in finished)
    figure = Figure(figsize=(13 if has_memory else 7.5, 5.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2 if has_memory else 1, sharey=True, squeeze=False)[0]
    by_count = _Scale.of(finished, lambda one: float(one.trainable or 1), is_log=True)
    _draw_panel(panels[0], result, finished, by_count, "trainable parameters")
    _label_counts(panels[0], finished)
    if has_memory:
        scale, unit = (GIB, "GiB") if max(one.device_bytes or 0 for one in finished) >= GIB else (MIB, "MiB")
        by_bytes = _Scale.of(finished, lambda one: (one.device_bytes or 0) / scale, is_log=False)
        _draw_panel(panels[1], result, finished, by_bytes, f"planned memory of a GPU ({unit})")
    panels[0].set_ylabel(f"{result.metric}, {result.n_folds} folds")
    if _is_wide(result, finished):
        panels[0].set_yscale("log")  # of both, which share it
        panels[0].yaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6 if has_memory else 3, frameon=False)
    figure.suptitle(f"chosen: {result.chosen.label}", fontsize=13, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _is_wide(result: SearchResult, finished: Sequence[Tried]) -> bool:
    """Whether losses are so far apart that a linear axis would hide the differences between the best ones."""
    values = [value for one in finished for value in one.values]
    return not higher_is_better(result.metric) and min(values) > 0 and max(values) > WIDE * min(values)


def _label_counts(axes: Axes, finished: Sequence[Tried]) -> None:
    """A logarithmic axis with a tick at each count."""
    counts = sorted({one.trainable or 1 for one in finished})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()


def _draw_panel(axes: Axes, result: SearchResult, finished: Sequence[Tried], place: _Scale, name: str) -> None:
    best = result.best
    low, high = best.mean - best.standard_error, best.mean + best.standard_error
    axes.axhspan(low, high, color="#DDDDDD", alpha=0.6, linewidth=0, label="one standard error around the best")
    series = _series(finished)
    are_many = len(series) > len(COLOURS)
    for index, (label, members) in enumerate(series.items()):
        colour = GREY if are_many else COLOURS[index]
        xs = [place.x(one, index, len(series)) for one in members]
        _draw_series(axes, members, xs, colour, NO_LABEL if are_many else label)
        for one, x in zip(members, xs, strict=True):
            for marked, marker, size, word in ((best, "s", 14, "best"), (result.chosen, "o", 20, "chosen")):
                if one == marked:
                    axes.plot([x], [one.mean], marker=marker, markersize=size, label=word, zorder=4, **MARKED)
    axes.set_xlabel(name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)


def _draw_series(axes: Axes, members: Sequence[Tried], xs: Sequence[float], colour: str, label: str) -> None:
    for one, x in zip(members, xs, strict=True):
        axes.plot([x] * len(one.values), one.values, ".", color=colour, alpha=0.35, markersize=7)
    means, errors = [one.mean for one in members], [one.standard_error for one in members]
    axes.errorbar(xs, means, errors, color=colour, marker="o", markersize=6, capsize=4, linewidth=1.3, label=label)


def _series(finished: Sequence[Tried]) -> dict[str, list[Tried]]:
    """The combinations that differ in their rank only, smallest first, by what they have in common."""
    found: dict[str, list[Tried]] = {}
    for one in sorted(finished, key=lambda one: one.rank):
        common = ", ".join(f"{name} = {value}" for name, value in one.point.items() if name != "r")
        found.setdefault(common or "mean ± standard error", []).append(one)
    return found
