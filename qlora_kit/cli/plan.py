"""`qlora-kit plan`: what a run will take of a GPU's memory, when, and for what, without a GPU or a download."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command
from qlora_kit.config.rules import Checked, setting
from qlora_kit.config.settings import DataConfig, RunConfig
from qlora_kit.errors import Faults, UserError, named

if TYPE_CHECKING:
    from qlora_kit.adapters.unquantized import Unquantized
    from qlora_kit.memory import rules
    from qlora_kit.memory.fit import Budget
    from qlora_kit.memory.report import Compared, PlanReport

WIDTH = 118  # columns where the output is no terminal
DATA_OF_NONE = DataConfig().data  # where no data was named
DEVICE = "device"  # what `--fit` calls the free memory of the CUDA device present


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Checked):
    """The flags of this command alone."""

    gpu: str | None = setting(None, "GPU to plan for: rtx3060, rtx4090, t4, a100, h100, …", metavar="NAME")
    fit: str | None = setting(
        None,
        "list what fits into this much memory: 8GiB, 6000MiB, 24GB, or device (what is free on the GPU present)",
        metavar="SIZE",
    )
    exact: bool = setting(False, "simulate every layer instead of extrapolating from 3 and 4")
    baselines: bool = setting(True, "compare with 16-bit LoRA and full fine-tuning")
    json: bool = setting(False, "print JSON instead of tables")
    plot: str | None = setting(None, "draw the plan into this PNG file", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for beside the plan of the run itself."""

    gpu: rules.Gpu | None
    budget: Budget | None
    fit: bool = False
    exact: bool = False
    baselines: bool = True


def run(config: RunConfig, **given: Any) -> None:
    """Plan `config` and print what was found; `given` are those of `PlanFlags`. Raises `UserError`."""
    from rich.console import Console

    from qlora_kit.memory import picture, report
    from qlora_kit.runs import messages
    from qlora_kit.system.progress import say_line

    flags = PlanFlags(**given)
    request, target = _checked(flags)
    _check_model(config)
    asked, config = config, _of_its_data(config)
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(highlight=False, soft_wrap=False, quiet=flags.json, width=width)

    def say_early(early: PlanReport) -> None:
        for line in [] if config.base.task is None else messages.task_lines(asked.base, config.base):
            say_line(console, line)
        for line in messages.unquantized_lines(_left_in_16_bits(config), config.base.bits):
            say_line(console, line)
        report.say_plan(early, console)

    found = make_report(config, request, say_early)
    if flags.json:
        print_json(found)
    report.say(found, console)
    if target is not None:
        picture.write_picture(found, target)
        console.print(f"\nPicture: {target}")


def print_json(report: PlanReport) -> None:
    """Print `report` as JSON, and nothing else, to standard output."""
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))


def _checked(flags: PlanFlags) -> tuple[Request, Path | None]:
    """What was asked for, and where the picture goes. Raises one `UserError` with every fault."""
    from qlora_kit.memory import picture
    from qlora_kit.memory.fit import Budget, find_gpu, parse_size, present_device

    gpu = budget = target = None
    with Faults() as faults:
        with faults.collecting():
            target = None if flags.plot is None else picture.check_target(flags.plot)
        with faults.collecting():
            gpu = None if flags.gpu is None else find_gpu(flags.gpu)
        with faults.collecting():
            if flags.fit == DEVICE:
                present, budget = present_device()
                gpu = gpu or present
            elif flags.fit is not None:
                budget = Budget(parse_size(flags.fit), "as given")
    if budget is None and gpu is not None:
        budget = Budget(gpu.memory_bytes, f"{gpu.name}, nominal")
    asked = Request(gpu=gpu, budget=budget, fit=flags.fit is not None, exact=flags.exact, baselines=flags.baselines)
    return asked, target


def make_report(config: RunConfig, request: Request, say_early: Callable[[PlanReport], None]) -> PlanReport:
    """Everything that `request` asks about `config`; the plan itself goes to `say_early` as soon as it is there."""
    from qlora_kit.memory import fit as fitting
    from qlora_kit.memory.plan import plan
    from qlora_kit.memory.report import PlanReport

    own = plan(config, exact=request.exact, gpu=request.gpu)
    report = PlanReport(config=config, plan=own, gpu=request.gpu, budget=request.budget)
    say_early(report)
    report = replace(report, compared=_compared(config, request))
    if request.budget is None or (report.fits and not request.fit):
        return report
    with _counting() as tick:
        planner = fitting.Planner(config, request.gpu, tick)
        savings = fitting.savings(planner, request.budget)
        report = replace(report, savings=savings)
        if not report.fits:
            report = replace(report, together=fitting.together(planner, request.budget, savings))
        if request.fit:
            on, fit = fitting.switched_on(planner), fitting.find_fit(planner, request.budget)
            report = replace(report, switched_on=on, fit=fit)
    return report


def _of_its_data(config: RunConfig) -> RunConfig:
    """`config` with the task and the labels that its data say to a run, where it names none. Raises `UserError`.

    The demo's text says nothing: then the task is what models of the kind are for.
    """
    if config.base.task is not None or config.data.data == DATA_OF_NONE:
        return config
    from qlora_kit import data
    from qlora_kit.memory.plan import resolve_architecture
    from qlora_kit.tasks import registry
    from qlora_kit.tasks.task import Source

    records = data.read_rows(config.data.data, config.data.columns)
    task = registry.choose(config.base, records, config.data.columns, resolve_architecture(config))
    named = replace(config, base=replace(config.base, task=task.name))
    resolve_architecture(named)  # may be unable to do what the data is for
    if not task.model.has_labels:
        return named
    source = Source(records=records, name=config.data.data, columns=config.data.columns)
    return replace(config, base=task.resolve(named.base, task.read(source, named.base), "data"))


def _left_in_16_bits(config: RunConfig) -> Unquantized | None:
    """What the bits leave in 16 of a model that was planned all the same, as the settings allow."""
    from qlora_kit.adapters import unquantized
    from qlora_kit.memory.plan import resolve_architecture

    if not config.base.allow_16_bit_experts and config.base.bits <= 8:  # it would have been refused
        return None
    return unquantized.of_run(config, unquantized.foresee(config, resolve_architecture(config)))


def _check_model(config: RunConfig) -> None:
    """Raises `UserError` where there is no such model, with the architectures whose names are near."""
    from qlora_kit.memory.plan import resolve_architecture
    from qlora_kit.model.architectures import ARCHITECTURES

    try:
        resolve_architecture(config)
    except UserError as error:
        name = Path(config.base.model).name.lower()
        near = [named("model", n) for n in difflib.get_close_matches(name, ARCHITECTURES, n=3)]
        if not near or config.base.weights == "random":  # there the message has them
            raise
        hint = f"Did you mean {' or '.join(near)}, which needs no download? "
        raise UserError([replace(fault, remedy=hint + fault.remedy) for fault in error.faults]) from None


def _compared(config: RunConfig, request: Request) -> tuple[Compared, ...]:
    """The baselines that the model and the GPU can run, with the run's own checkpointing, then with the other."""
    from qlora_kit.memory.baselines import BASELINES, possible_plan
    from qlora_kit.memory.report import Compared

    if not request.baselines:
        return ()
    own = config.optim.gradient_checkpointing
    return tuple(
        Compared(
            baseline=baseline.on(request.gpu),
            checkpointing=checkpointing,
            default=checkpointing == own and baseline.default,
            plan=found,
        )
        for checkpointing in (own, not own)
        for baseline in BASELINES
        if (found := possible_plan(config, baseline, checkpointing=checkpointing, gpu=request.gpu)) is not None
    )


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """A line on a terminal's standard error that counts the plans being made."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("planning other settings…") as status:
        yield lambda n: status.update(f"planning other settings… {n} plans")


COMMAND = Command(
    run=run,
    example="qlora-kit plan --model meta-llama/Llama-3.1-8B --gpu rtx3060 --seq-len 2048",
    flags=PlanFlags,
    headings=("model", "adapter", "data", "optimizer", "memory"),
)
