"""A profile as a picture: predicted beside measured, and the measured bytes over the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.memory.picture import PALETTE, in_step_order
from qlora_kit.memory.plan import MemoryPoint
from qlora_kit.memory.profile.result import UNATTRIBUTED, MemoryProfile
from qlora_kit.system.progress import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB, MIB = 1 << 30, 1 << 20
COLOURS = {**PALETTE, UNATTRIBUTED: "#F0F0F0"}
SMALL = 0.005  # components below this share of the peak get no name in the legend


def draw_profile(profile: MemoryProfile, file: Path) -> None:
    """Draw `profile` into the PNG `file`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    bars, step = figure.subplots(1, 2, width_ratios=(1, 2))
    scale, unit = (GIB, "GiB") if profile.peak_bytes >= GIB else (MIB, "MiB")
    columns = {"measured": profile.components}
    if profile.predicted is not None:
        columns = {"predicted": profile.predicted.components, **columns}
    _draw_bars(bars, columns, scale)
    _draw_step(step, profile, scale)
    for axes in (bars, step):
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    everywhere = [*columns.values(), *(point.components for point in profile.series)]
    shown = [n for n in COLOURS if any(c.get(n, 0) > SMALL * profile.peak_bytes for c in everywhere)]
    patches = [Patch(facecolor=COLOURS[name], label=name) for name in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False)
    error = "" if profile.error is None else f", prediction {profile.error:+.2%}"
    figure.suptitle(
        f"{human_bytes(profile.peak_bytes)} at the peak on {profile.device}{error} "
        f"({profile.rows} × {profile.tokens} tokens)"
    )
    figure.savefig(file, format="png")


def _draw_bars(axes: Axes, columns: Mapping[str, Mapping[str, int]], scale: int) -> None:
    bottoms = [0.0] * len(columns)
    for name, colour in COLOURS.items():
        heights = [components.get(name, 0) / scale for components in columns.values()]
        if any(heights):
            axes.bar(list(columns), heights, 0.7, bottoms, color=colour, edgecolor="white", linewidth=0.6)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for x, total in enumerate(bottoms):
        axes.text(x, total, f"{total:,.2f}", ha="center", va="bottom")
    axes.set_ylim(0, 1.08 * max(bottoms))
    axes.set_title("at the peak, by component", fontsize=11)


def _draw_step(axes: Axes, profile: MemoryProfile, scale: int) -> None:
    points = drawn_points(profile)
    names = [name for name in COLOURS if any(point.components.get(name) for point in points)]
    stacks = [[point.components.get(name, 0) / scale for point in points] for name in names]
    x = range(len(points) + 1)
    axes.stackplot(x, [[*s, s[-1]] for s in stacks], colors=[COLOURS[n] for n in names], step="post", linewidth=0)
    starts = _starts([point.phase for point in points])
    for at, phase in starts:
        axes.axvline(at, color="0.4", linewidth=0.6, linestyle=":")
        axes.text(at + 0.1, 1.0, phase, rotation=90, va="top", fontsize=8, transform=axes.get_xaxis_transform())
    axes.margins(x=0, y=0.2)
    axes.set_xticks([])
    axes.set_title("the most in each part of the last step (widths are not time)", fontsize=11)


def drawn_points(profile: MemoryProfile) -> list[MemoryPoint]:
    """The most of each block and phase of the last step, in its order."""
    return in_step_order([point for point in profile.series if point.phase != "idle"])


def _starts(phases: Sequence[str]) -> list[tuple[int, str]]:
    """Where a phase begins that is not the one before."""
    return [(i, phase) for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
