"""A plan in words: tables for a terminal, and plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.config.settings import VARIANTS, RunConfig
from qlora_kit.memory import rules
from qlora_kit.memory.baselines import Baseline
from qlora_kit.memory.fit import Budget, Fit, LargestRun, Saving
from qlora_kit.memory.plan import MemoryPlan
from qlora_kit.system import files
from qlora_kit.system.progress import PHASES, human_bytes

NOT_VALIDATED = "predicted, not yet validated on hardware"
PHASES_IN_WORDS = {
    "load": "loading the model",
    "forward": "the forward pass",
    "loss": "the head and the loss",
    "loss backward": "the backward pass of the loss",
    "backward": "the backward pass",
    "clip": "clipping the gradients",
    "optimizer": "the optimizer's step",
    "idle": "between two steps",
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Another way to train the same run, and its plan. `default`: the usual alternative."""

    baseline: Baseline
    checkpointing: bool
    default: bool
    plan: MemoryPlan

    @property
    def recipe(self) -> str:
        return f"{self.baseline.recipe}, {'with' if self.checkpointing else 'without'} checkpointing"

    def ratio(self, plan: MemoryPlan) -> float:
        """How many times the peak of `plan` this one has; below 1 where it takes less."""
        return self.plan.peak_bytes / plan.peak_bytes


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """All that `qlora-kit plan` has found out about a run. `savings` and `together` are there where it was asked."""

    config: RunConfig
    plan: MemoryPlan
    gpu: rules.Gpu | None = None
    budget: Budget | None = None
    compared: tuple[Compared, ...] = ()
    fit: Fit | None = None
    savings: tuple[Saving, ...] = ()
    together: Saving | None = None
    switched_on: tuple[Saving, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into the budget; None without one."""
        return None if self.budget is None else self.plan.device_bytes <= self.budget.n_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON; all sizes are bytes."""
        budget = None if self.budget is None else {**dataclasses.asdict(self.budget), "fits": self.fits}
        return {
            "basis": NOT_VALIDATED,
            "settings": self.config.to_dict(),
            "versions": files.versions(),
            "gpu": None if self.gpu is None else dataclasses.asdict(self.gpu),
            "plan": self.plan.to_dict(),
            "budget": budget,
            "baselines": [_compared_dict(c, self.plan) for c in self.compared],
            "fit": None if self.fit is None else dataclasses.asdict(self.fit),
            "savings": [_change_dict(change) for change in self.savings],
            "together": None if self.together is None else _change_dict(self.together),
            "switched_on": [_change_dict(change) for change in self.switched_on],
        }


def _compared_dict(compared: Compared, plan: MemoryPlan) -> dict[str, Any]:
    values = {k: v for k, v in compared.plan.to_dict().items() if k not in ("series", "phases")}
    return {
        "name": compared.baseline.name,
        "recipe": compared.recipe,
        "default": compared.default,
        "gradient_checkpointing": compared.checkpointing,
        "ratio": compared.ratio(plan),
        "saved_bytes": compared.plan.peak_bytes - plan.peak_bytes,
        "plan": values,
    }


def _change_dict(change: Saving) -> dict[str, Any]:
    return {**dataclasses.asdict(change), "settings": dict(change.settings)}


def title(config: RunConfig, plan: MemoryPlan) -> str:
    """The run in a line: model, method, batch and length."""
    path = Path(config.base.model)
    model = path.parent.name if path.name == "config.json" else path.name
    return f"{model}, {method(config)}, batch {plan.batch_size} × {plan.seq_len} tokens"


def method(config: RunConfig) -> str:
    """How the run trains, in words."""
    if config.base.full:
        return f"full fine-tuning in {'bf16' if config.base.bits == 16 else 'fp32'}"
    kind = "DoRA" if config.adapter.dora else VARIANTS[config.adapter.variant]
    return f"{config.base.bits}-bit {kind}, r = {config.adapter.r}"


def where(plan: MemoryPlan) -> str:
    """When in the step the peak is: phase, block and operation."""
    block = "" if plan.block is None else f", block {plan.block} of {plan.layers}"
    operation = f", at {operation_name(plan.operation)}" if plan.operation else ""
    return f"{PHASES_IN_WORDS.get(plan.phase, plan.phase)}{block}{operation}"


def operation_name(operation: str) -> str:
    """`aten._log_softmax_backward_data.default` without its namespace and overload."""
    parts = operation.split(".")
    return parts[1] if len(parts) > 1 else operation


def say_plan(report: PlanReport, console: Console) -> None:
    """Print the run, its peak, its components and what comes beside them."""
    config, plan = report.config, report.plan
    trained = f"{_count(plan.n_trainable)} of {_count(plan.n_parameters)} parameters trained"
    switches = "checkpointing" if config.optim.gradient_checkpointing else "no checkpointing"
    console.print(Text(title(config, plan), style="bold"))
    console.print(f"{trained}; {_depth(plan)}")
    console.print(f"{plan.optim}, {switches}, {plan.attention} attention")
    for line in _time_lines(config, plan):
        console.print(line)
    console.print()
    peak = f"Peak of torch.cuda.max_memory_allocated in the training step: {human_bytes(plan.peak_bytes)}"
    console.print(Text(peak, style="bold green"))
    console.print(f"  in {where(plan)}")
    console.print(f"The GPU needs {human_bytes(plan.device_bytes)} free, for {largest_in_words(plan)}")
    console.print(f"  ({NOT_VALIDATED})\n")
    console.print(_components_table(plan))
    console.print(_extras_table(plan))
    console.print(_phases_table(plan))
    console.print(_stages_table(plan))


def largest_in_words(plan: MemoryPlan) -> str:
    """The phase of the run that takes the most, and what is done in it."""
    return f"{PHASES[plan.largest_stage]} ({plan.largest.what})"


def _time_lines(config: RunConfig, plan: MemoryPlan) -> list[str]:
    """How much longer a step takes with the regularization in `config`."""
    lines = []
    if plan.passes > 1:
        lines.append(
            f"{plan.passes} passes over each batch (--adversarial {config.optim.adversarial}): about {plan.passes} "
            "times as long as a plain step"
        )
    if config.optim.rank_penalty is not None:
        lines.append("two QR decompositions of each layer's factors in every step (--rank-penalty)")
    return lines


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _depth(plan: MemoryPlan) -> str:
    return f"{plan.layers} layers, {'every one simulated' if plan.exact else 'extrapolated from 3 and 4'}"


def _table(heading: str, *columns: str) -> Table:
    """A table whose first column is text, as are those that begin with `~`; the others are numbers."""
    table = Table(title=Text(heading, style="bold"), title_justify="left", header_style="dim", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        is_text = index == 0 or name.startswith("~")
        table.add_column(
            name.removeprefix("~"), justify="left" if is_text else "right", no_wrap=not name.startswith("~")
        )
    return table


def _components_table(plan: MemoryPlan) -> Table:
    table = _table("At the peak", "component", "bytes", "size", "share")
    for name, n_bytes in plan.components.items():
        if n_bytes:
            table.add_row(name, f"{n_bytes:,}", human_bytes(n_bytes), f"{n_bytes / plan.peak_bytes:.1%}")
    absent = [name for name, n_bytes in plan.components.items() if not n_bytes]
    table.add_row("total", f"{plan.peak_bytes:,}", human_bytes(plan.peak_bytes), "100.0%", style="bold")
    if absent:
        table.caption, table.caption_justify = f"Not at the peak: {', '.join(absent)}.", "left"
    return table


def _extras_table(plan: MemoryPlan) -> Table:
    table = _table("\nNot counted by torch", "what", "bytes", "size", "on", "~basis")
    for extra in plan.extras:
        place = "GPU" if extra.on_device else "host or GPU" if extra.moves else "host"
        table.add_row(extra.name, f"{extra.n_bytes:,}", human_bytes(extra.n_bytes), place, extra.basis)
    return table


def _phases_table(plan: MemoryPlan) -> Table:
    table = _table("\nThe peak of each part of the step", "part", "size", "largest component", "~at")
    for phase, point in plan.phases.items():
        largest = max(point.components, key=lambda name: point.components[name])
        at = operation_name(point.operation)
        at = at if point.block is None else f"{at}, block {point.block}"
        table.add_row(phase, human_bytes(point.live_bytes), largest, at)
    return table


def _stages_table(plan: MemoryPlan) -> Table:
    table = _table("\nThe peak of each phase of the run", "phase", "size", "largest component", "~of")
    for name, stage in plan.stages.items():
        is_largest = name == plan.largest_stage
        largest = max(stage.components, key=lambda kind: stage.components[kind])
        marked = f"{PHASES[name]}{' (the largest)' if is_largest else ''}"
        table.add_row(marked, human_bytes(stage.peak_bytes), largest, stage.what, style="bold" if is_largest else None)
    if plan.unplanned:
        table.caption, table.caption_justify = f"Evaluation and answers are not planned ({plan.unplanned}).", "left"
    return table


def say_compared(report: PlanReport, console: Console) -> None:
    """Print the run beside those that it is compared with."""
    table = _table(
        "\nThe same run trained in other ways", "run", "peak", "in", "with extras", "ratio", "saved here", "~recipe"
    )
    own = report.plan
    sizes = (human_bytes(own.peak_bytes), own.phase, human_bytes(own.device_bytes))
    table.add_row("this run", *sizes, "1.00", "", method(report.config), style="bold")
    for compared in report.compared:
        saved_bytes = compared.plan.peak_bytes - own.peak_bytes
        table.add_row(
            compared.baseline.name + (" *" if compared.default else ""),
            human_bytes(compared.plan.peak_bytes),
            compared.plan.phase,
            human_bytes(compared.plan.device_bytes),
            f"{compared.ratio(own):.2f}",
            signed_bytes(saved_bytes),
            compared.recipe,
        )
    if any(compared.default for compared in report.compared):
        table.caption, table.caption_justify = (
            "* the usual alternatives, with the run's own checkpointing",
            "left",
        )
    console.print(table)


def signed_bytes(n_bytes: int) -> str:
    """Bytes saved, or how much more is taken."""
    return human_bytes(n_bytes) if n_bytes >= 0 else f"−{human_bytes(-n_bytes)} (takes more)"


def say_budget(report: PlanReport, console: Console) -> None:
    """Print whether the run fits, and if not what would make it fit."""
    budget, plan = report.budget, report.plan
    if budget is None:
        return
    size = f"{human_bytes(budget.n_bytes)} ({budget.source})"
    if report.fits:
        left = human_bytes(budget.n_bytes - plan.device_bytes)
        console.print(Text(f"\nFits into {size}, with {left} to spare.", style="bold green"))
        return
    over = human_bytes(plan.device_bytes - budget.n_bytes)
    components = plan.largest.components
    largest = max(components, key=lambda name: components[name])
    console.print(Text(f"\nDoes not fit into {size}: it needs {over} more.", style="bold red"))
    console.print(f"It is largest in {largest_in_words(plan)}.")
    console.print(f"Largest part: {largest}, {human_bytes(components[largest])}.")
    if report.together is not None:
        then = human_bytes(report.together.device_bytes)
        console.print(f"With {report.together.flags} it needs {then}, and fits.")
    else:
        console.print("None of the changes below is enough, not even all of them together.")


def say_savings(report: PlanReport, console: Console) -> None:
    """Print what other settings would save, and what those of the run save already; the most first."""
    if report.savings:
        table = _table("\nChanges that take less, each planned", "~change", "saves", "then needs", "fits")
        for change in report.savings:
            _add_change(table, change)
        console.print(table)
    if report.switched_on:
        table = _table("\nSavings that are on already", "~switch", "saves", "without it")
        for change in report.switched_on:
            table.add_row(change.flags, human_bytes(change.saves_bytes), human_bytes(change.device_bytes))
        console.print(table)


def _add_change(table: Table, change: Saving) -> None:
    fits = {None: "", True: "yes", False: "no"}[change.fits]
    table.add_row(change.flags, human_bytes(change.saves_bytes), human_bytes(change.device_bytes), fits)


def say_fit(report: PlanReport, console: Console) -> None:
    """Print the largest batch of each length, and the longest sequence of batch 1."""
    fit = report.fit
    if fit is None:
        return
    heading = f"\nWhat fits into {human_bytes(fit.budget.n_bytes)} ({fit.budget.source})"
    table = _table(heading, "tokens of an example", "largest batch", "then needs")
    for found in fit.batches:
        table.add_row(f"{found.seq_len}", _batch(found), _need(found))
    console.print(table)
    console.print(f"Longest sequence of batch 1: {_longest(fit.longest)}")


def _batch(found: LargestRun) -> str:
    return f"{found.batch_size}{' or more' if found.at_limit else ''}" if found.batch_size else "none"


def _need(found: LargestRun) -> str:
    return "" if found.device_bytes is None else human_bytes(found.device_bytes)


def _longest(found: LargestRun) -> str:
    if not found.seq_len:
        return "none, not even two tokens fit."
    end = ", the model's limit" if found.at_limit else ""
    return f"{found.seq_len} tokens{end} ({_need(found)})."


def say(report: PlanReport, console: Console) -> None:
    """Print all of a report except the plan itself, which is printed earlier."""
    parts = [say_compared] if report.compared else []
    for part in (*parts, say_budget, say_savings, say_fit):
        part(report, console)


def default_ones(compared: Iterable[Compared]) -> list[Compared]:
    """Those that a picture shows beside the run: the usual alternatives."""
    return [c for c in compared if c.default]
