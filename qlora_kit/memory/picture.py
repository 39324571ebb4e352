"""A plan as a picture: the memory of the run and of its baselines, and the live bytes over a step."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError, named
from qlora_kit.memory.fit import Budget
from qlora_kit.memory.plan import MemoryPlan, MemoryPoint
from qlora_kit.memory.report import NOT_VALIDATED, PlanReport, default_ones, method, operation_name, title
from qlora_kit.memory.track import CATEGORIES
from qlora_kit.system.files import write_bytes
from qlora_kit.system.progress import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB, MIB = 1 << 30, 1 << 20
SMALL = 0.01  # components below this share of the largest bar (left) or of the peak (right) are merged
LIGHT = 115  # brightness from which black text reads better than white
LABELLED = 0.06  # parts of a bar from this share of the axis on carry their name
OTHER, BESIDE = "other", "beside torch's count"
PALETTE = {  # Tol's muted colours, which the colour-blind tell apart; neighbours in a stack differ in lightness too
    "quantized weights": "#332288",
    "quantization state": "#7A9CCF",
    "weights": "#0A6AA8",
    "embeddings and head": "#88CCEE",
    "norms and biases": "#5A6B7B",
    "adapters": "#117733",
    "gradients": "#B5B84B",
    "optimizer states": "#EBDD9A",
    "checkpoints": "#2A9D8F",
    "activations": "#E39AA5",
    "recomputed block": "#882255",
    "loss": "#E07B2F",
    "inputs": "#444444",
    "workspaces": "#AA4499",
    OTHER: "#C9C9C9",
}
BUDGET_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
LEGEND_COLUMNS = 5
PHASE_WIDTH = 0.22  # of a part without blocks, as a share of the width of all blocks of a pass


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its name, its components in bytes, and the bytes besides them."""

    name: str
    note: str
    components: Mapping[str, int]
    beside_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Part:
    """A stretch of the step in the right half: where it begins and ends, in widths of a block."""

    point: MemoryPoint
    left: float
    right: float


def check_target(path: str) -> Path:
    """The file that `plot` names. Raises `UserError` unless it is a .png in a folder that can be written."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise UserError.of(
            "plot", path, "must end in .png", f"For example {named('plot', (target.stem or 'plan') + '.png')}."
        )
    if target.is_dir():
        raise UserError.of("plot", path, "is a folder", "Give a file in it.")
    if not target.parent.is_dir():
        raise UserError.of("plot", path, f"there is no folder {target.parent}", "Create it first, or choose another.")
    if not os.access(target.parent, os.W_OK):
        raise _unwritable(path, "permission denied")
    return target


def _unwritable(path: str, why: str) -> UserError:
    return UserError.of("plot", path, f"cannot be written ({why})", "Choose a folder that you can write to.")


def write_picture(report: PlanReport, target: Path) -> None:
    """Draw `report` into the PNG `target`, whole or not at all. Raises `UserError` where it cannot be written."""
    image = draw(report)
    try:
        write_bytes(target, image)
    except OSError as error:
        raise _unwritable(str(target), error.strerror or "") from None


def draw(report: PlanReport) -> bytes:
    """The picture of `report` as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.8), dpi=130)
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1, 1.75), left=0.05, right=0.985, top=0.86, bottom=0.235, wspace=0.14
    )
    bars, step = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    shown = [*_draw_bars(bars, report), *_draw_step(step, report.plan)]
    _draw_legend(figure, shown, report.budget)
    figure.suptitle(title(report.config, report.plan), x=0.05, y=0.965, ha="left", fontsize=16, fontweight="bold")
    figure.text(0.05, 0.012, _footer(report), fontsize=9, color="#555555")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _footer(report: PlanReport) -> str:
    plan = report.plan
    gpu = f"for {plan.gpu}" if plan.gpu else "for compute capability 8"
    return f"qlora-kit plan, {gpu}; {plan.optim}, {plan.attention} attention. {NOT_VALIDATED.capitalize()}."


def _draw_legend(figure: Any, shown: Iterable[str], budget: Budget | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [name for name in (*PALETTE, BESIDE) if name in set(shown)]
    patches: list[Any] = [Patch(**_style(name), label=_legend_name(name)) for name in names]
    if budget is not None:
        patches.append(Line2D([], [], label=f"{human_bytes(budget.n_bytes)}: {budget.source}", **BUDGET_LINE))
    columns = min(len(patches), LEGEND_COLUMNS)
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.03)}
    figure.legend(handles=patches, ncols=columns, frameon=False, fontsize=10.5, **place)


def _legend_name(name: str) -> str:
    return {OTHER: "other (each < 1 %)", BESIDE: "CUDA context, fragmentation"}.get(name, name)


def _style(name: str) -> dict[str, Any]:
    if name == BESIDE:
        return {"facecolor": "white", "edgecolor": "#999999", "hatch": "////", "linewidth": 0.8}
    return {"facecolor": PALETTE[name], "edgecolor": "white", "linewidth": 0.8}


def _draw_bars(axes: Axes, report: PlanReport) -> list[str]:
    """The run beside its baselines; returns the components that have a colour of their own in it."""
    bars = _bars(report)
    size, unit = _unit(max(bar.peak_bytes + bar.beside_bytes for bar in bars))
    shown = _large((bar.components for bar in bars), max(bar.peak_bytes for bar in bars))
    top = max(bar.peak_bytes + bar.beside_bytes for bar in bars) / size * 1.17
    for x, bar in enumerate(bars):
        bottom = 0.0
        for name, n_bytes in [*_merged(bar.components, shown).items(), (BESIDE, bar.beside_bytes)]:
            height = n_bytes / size
            axes.bar(x, height, width=0.72, bottom=bottom, **_style(name))
            if height > LABELLED * top and name != BESIDE:
                _label_part(axes, x, bottom + height / 2, name, f"{height:.1f}")
            bottom += height
        _label_bar(axes, x, bottom, bar, bars[0])
    axes.set_ylim(0, top)
    axes.set_xlim(-0.55, max(len(bars) - 0.45, 1.5))
    axes.set_xticks(range(len(bars)), [f"{bar.name}\n{bar.note}" for bar in bars], fontsize=10)
    axes.set_ylabel(unit)
    axes.set_title("Peak memory on the GPU, by component", loc="left", fontsize=12)
    if report.budget is not None and report.budget.n_bytes / size < top:
        axes.axhline(report.budget.n_bytes / size, **BUDGET_LINE)
    _tidy(axes)
    return [*shown, BESIDE, *([OTHER] if any(OTHER in _merged(b.components, shown) for b in bars) else [])]


def _bars(report: PlanReport) -> list[Bar]:
    own = report.plan
    bars = [_bar("this run", method(report.config).replace(", ", ",\n"), own)]
    for compared in default_ones(report.compared):
        note = compared.baseline.short.replace(", ", ",\n", 1)
        bars.append(_bar(compared.baseline.title, note, compared.plan))
    return bars


def _bar(name: str, note: str, plan: MemoryPlan) -> Bar:
    return Bar(name=name, note=note, components=plan.components, beside_bytes=plan.beside_bytes)


def _label_part(axes: Axes, x: float, y: float, name: str, value: str) -> None:
    red, green, blue = (int(PALETTE[name][i : i + 2], 16) for i in (1, 3, 5))
    color = "black" if 0.21 * red + 0.72 * green + 0.07 * blue > LIGHT else "white"
    axes.text(x, y, f"{name}\n{value}", ha="center", va="center", fontsize=8.5, color=color, linespacing=1.1)


def _label_bar(axes: Axes, x: float, y: float, bar: Bar, own: Bar) -> None:
    text = human_bytes(bar.peak_bytes)
    if bar is not own:
        text += f"\n{bar.peak_bytes / own.peak_bytes:.2f} × this run"
    place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line of the budget stops at it
    axes.annotate(text, (x, y), fontsize=11, weight="bold", bbox=behind, **place)


def _draw_step(axes: Axes, plan: MemoryPlan) -> list[str]:
    """Live bytes over the second step; returns the components that have a colour of their own in it."""
    parts = list(_parts(in_step_order(plan.series)))
    size, unit = _unit(plan.peak_bytes)
    shown = _large((part.point.components for part in parts), plan.peak_bytes)
    merged = [_merged(part.point.components, shown) for part in parts]
    names = [name for name in PALETTE if any(name in components for components in merged)]
    x = [part.left for part in parts] + [parts[-1].right]
    stacks = [[components.get(name, 0) / size for components in merged] for name in names]
    styles: dict[str, Any] = {"colors": [PALETTE[name] for name in names], "step": "post", "linewidth": 0}
    axes.stackplot(x, [[*heights, heights[-1]] for heights in stacks], **styles)
    axes.set_xlim(0, x[-1])
    axes.set_ylim(0, plan.peak_bytes / size * 1.17)
    _label_phases(axes, parts)
    _mark_peak(axes, plan, parts, size)
    axes.set_ylabel(unit)
    axes.set_title(
        "Live bytes over one step (the most in each block and phase; widths are not time)", loc="left", fontsize=12
    )
    _tidy(axes)
    return names


def in_step_order(series: Sequence[MemoryPoint]) -> list[MemoryPoint]:
    """The most of each block and each phase, in the order of the step.

    A pass is outside its blocks both before and after them, and the plan has the larger moment of the two: it goes
    to the end that it resembles.
    """
    ordered: list[MemoryPoint] = []
    for phase in dict.fromkeys(point.phase for point in series):
        points = [point for point in series if point.phase == phase]
        blocks = list(dict.fromkeys(point.block for point in points if point.block is not None))
        blocks.sort(reverse=bool(blocks) and blocks[0] > blocks[-1])
        in_blocks = [max((p for p in points if p.block == block), key=_live) for block in blocks]
        outside = [point for point in points if point.block is None]
        late = [point for point in outside if in_blocks and _resembles(point, in_blocks[-1], in_blocks[0])]
        ordered += [*(point for point in outside if point not in late), *in_blocks, *late]
    return ordered


def _live(point: MemoryPoint) -> int:
    return point.live_bytes


def _resembles(point: MemoryPoint, one: MemoryPoint, other: MemoryPoint) -> bool:
    """Whether what is kept at `point` is more like that at `one` than at `other`."""
    kept = ("checkpoints", "gradients")
    near, far = (sum(abs(p.components[name] - point.components[name]) for name in kept) for p in (one, other))
    return near < far


def _parts(points: Sequence[MemoryPoint]) -> Iterable[Part]:
    blocks = len({point.block for point in points if point.block is not None})
    left = 0.0
    for point in points:
        width = 1.0 if point.block is not None else max(1.0, PHASE_WIDTH * blocks)
        yield Part(point, left, left + width)
        left += width


def _label_phases(axes: Axes, parts: Sequence[Part]) -> None:
    ticks, names = [], []
    for phase, left, right in _spans(parts):
        if left:
            axes.axvline(left, color="white", linewidth=1.2)
            axes.axvline(left, color="#888888", linewidth=0.6, linestyle=":")
        ticks.append((left + right) / 2)
        names.append(phase)
    axes.set_xticks(ticks, names, fontsize=9)
    axes.tick_params(axis="x", length=0)


def _spans(parts: Sequence[Part]) -> Iterable[tuple[str, float, float]]:
    """Each stretch that has a name of its own on the axis: from where to where."""
    begun: tuple[str, float] | None = None
    for index, part in enumerate(parts):
        begun = begun or (_span_name(part.point, parts), part.left)
        following = parts[index + 1] if index + 1 < len(parts) else None
        if following is None or _span_name(following.point, parts) != begun[0]:
            yield begun[0], begun[1], part.right
            begun = None


def _span_name(point: MemoryPoint, parts: Sequence[Part]) -> str:
    blocks = [p.point.block for p in parts if p.point.phase == point.phase and p.point.block is not None]
    if not blocks:
        return {"idle": "before"}.get(point.phase, point.phase.replace(" ", "\n"))
    if point.block is None:
        return f"rest of\n{point.phase}"
    return f"{point.phase}\nblocks {blocks[0]} to {blocks[-1]}"


def _mark_peak(axes: Axes, plan: MemoryPlan, parts: Sequence[Part], size: int) -> None:
    highest = max(parts, key=lambda part: part.point.live_bytes)
    at = (highest.left + highest.right) / 2, highest.point.live_bytes / size
    operation = operation_name(highest.point.operation)
    text = f"peak {human_bytes(highest.point.live_bytes)}: {highest.point.phase}"
    text += f", {operation}" if operation else ""
    if highest.point.live_bytes < plan.peak_bytes:
        text += f" (of the run: {human_bytes(plan.peak_bytes)}, {plan.phase}, first step)"
    line = {"arrowstyle": "-", "color": "black"}
    place: dict[str, Any] = {
        "xytext": (0.015, 0.965),
        "textcoords": "axes fraction",
        "va": "top",
    }  # above everything drawn
    axes.annotate(text, at, fontsize=10.5, weight="bold", arrowprops=line, **place)


def _unit(largest_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")


def _large(all_components: Iterable[Mapping[str, int]], of_bytes: int) -> list[str]:
    """The components that somewhere reach a share of `of_bytes` worth a colour."""
    most = dict.fromkeys(CATEGORIES, 0)
    for components in all_components:
        for name, n_bytes in components.items():
            most[name] = max(most.get(name, 0), n_bytes)
    return [name for name, n_bytes in most.items() if n_bytes >= SMALL * of_bytes]


def _merged(components: Mapping[str, int], shown: Sequence[str]) -> dict[str, int]:
    """The components in the order of the stack, those not `shown` added up as "other"."""
    kept = {name: components[name] for name in PALETTE if name in shown and components.get(name)}
    rest = sum(n_bytes for name, n_bytes in components.items() if name not in shown)
    return {**kept, OTHER: rest} if rest else kept


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
