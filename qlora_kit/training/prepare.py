"""What comes before the first step: settings are checked, data read, the memory planned, and the model built.

Nothing is written meanwhile. `train` and `profile` both begin here, so that what is measured is what a run does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import data
from qlora_kit.adapters import unquantized
from qlora_kit.build import Built, build_model
from qlora_kit.config.settings import RunConfig
from qlora_kit.memory import preflight
from qlora_kit.model.device import resolve_device
from qlora_kit.optim.optimizers import resolve_optim
from qlora_kit.runs import messages
from qlora_kit.runs.folder import ResumePoint, RunFolder, begin, check_place, find_resume_point
from qlora_kit.runs.inputs import (
    Examples,
    Inputs,
    check_vocabulary,
    digest_of,
    make_collator,
    read_inputs,
    weigh_labels,
)
from qlora_kit.system import files, quiet
from qlora_kit.system.progress import LOADING, PhasePeaks, say_line
from qlora_kit.training import held_out, resuming
from qlora_kit.training.check import check_settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready for its first step.

    `config` has all that the data and the plan decide. `optim` is the resolved optimizer, `point` where the run goes
    on (None for a new one), `planned` its plan (None where none was asked for). `collate` makes batches of
    `inputs`; `peaks` has the memory that the run took so far.
    """

    config: RunConfig
    device: torch.device
    optim: str
    point: ResumePoint | None
    inputs: Inputs
    planned: preflight.Preflight | None
    built: Built
    collate: Any
    peaks: PhasePeaks


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What the settings name, found and read; no model yet."""

    asked: RunConfig
    device: torch.device
    point: ResumePoint | None
    inputs: Inputs

    @property
    def config(self) -> RunConfig:
        return self.inputs.config


def prepare(config: RunConfig, say: Console, examples: Examples | None = None, *, measures: bool = False) -> Prepared:
    """Check, read, plan and build what `config` describes, and say so on `say`.

    `examples` stand in the place of the data that the settings name. A run that only `measures` takes its longest
    rows, holds nothing out, and is planned in any case. Nothing is written. Raises `UserError`.
    """
    read = _read(config, examples)
    _say_opening(read, say, measures)
    inputs = longest_only(read.inputs) if measures else read.inputs
    planned = _plan(inputs, read.device, say, always=measures)
    config = read.config if planned is None else dataclasses.replace(read.config, lean=planned.lean)
    peaks = PhasePeaks(read.device)
    with say.status(f"loading {config.base.model}"), peaks.during(LOADING):
        built = build_model(config, read.device)
    _say_model(built, config, say, measures)
    check_vocabulary(inputs.tokenizer, built.model)
    weigh_labels(built.model, read.inputs)  # by all of the data, whatever is measured of it
    return Prepared(
        config=config,
        device=read.device,
        optim=resolve_optim(config, read.device),
        point=read.point,
        inputs=inputs,
        planned=planned,
        built=built,
        collate=make_collator(built.model, inputs),
        peaks=peaks,
    )


def _read(config: RunConfig, examples: Examples | None) -> _Read:
    """Check what can be checked without a model, and read the data. Raises `UserError`."""
    check_settings(config, examples)
    device = resolve_device(config.base.device)
    config, point = _continued(config, device)
    check_place(point, config.out, config.overwrite)
    quiet.quiet_progress_bars()
    inputs = read_inputs(config, examples)
    if point is not None:
        resuming.check_held_out(config, point, digest_of(inputs.held_out))
    return _Read(asked=config, device=device, point=point, inputs=inputs)


def _continued(config: RunConfig, device: torch.device) -> tuple[RunConfig, ResumePoint | None]:
    """The settings, with what the run to resume took from its data, and where it goes on. Raises `UserError`."""
    if config.resume is None:
        return config, None
    point = find_resume_point(config.resume)
    config = resuming.as_before(config, point)
    resuming.check_resumable(config, point, device)
    return config, point


def longest_only(inputs: Inputs) -> Inputs:
    """`inputs` with the longest training rows alone, as many as the steps take: the most that this run can take.

    Where there are fewer they come over again.
    """
    optim = inputs.config.optim
    assert optim.max_steps is not None, "a profile has a number of steps"
    count = optim.batch_size * optim.grad_accum * optim.max_steps
    by_length: list[Any]
    if isinstance(inputs.train, data.PackedSet):
        by_length = sorted(inputs.train.rows, key=lambda row: -sum(len(example.input_ids) for example in row))
    else:
        by_length = sorted(
            inputs.train.rows, key=lambda row: -len(row.input_ids) - len(getattr(row, "labels", None) or ())
        )
    repeats = -(-count // len(by_length))
    train = dataclasses.replace(inputs.train, rows=(by_length * repeats)[:count])
    return dataclasses.replace(inputs, train=train, evaluation=None, held_out=[])


def _plan(inputs: Inputs, device: torch.device, say: Console, always: bool) -> preflight.Preflight | None:
    """The plan of the run, and on CUDA its refusal, where the settings ask for it; `always`: a plan in any case."""
    config = inputs.config
    if not (config.preflight or always):
        return None
    with say.status("planning the memory"):
        lengths = held_out.lengths(config, inputs)
        return preflight.plan_run(config, device, inputs.longest_row, checks=config.preflight, held_out=lengths)


def _say_opening(read: _Read, say: Console, measures: bool) -> None:
    opening = [] if measures else messages.opening(read.asked, read.device)
    for line in [*opening, *messages.task_lines(read.asked.base, read.config.base)]:
        say_line(say, line)
    for line in messages.unread_lines(read.inputs.unread):
        say_line(say, line)


def _say_model(built: Built, config: RunConfig, say: Console, measures: bool) -> None:
    for line in messages.unquantized_lines(unquantized.of_run(config, built.model), config.base.bits):
        say_line(say, line)
    if built.outcomes and not measures:
        say.print(messages.step_table(built.outcomes))


@contextmanager
def run_folder(prepared: Prepared, say: Console, suffix: str = "") -> Iterator[RunFolder]:
    """The folder of the run, new or resumed, where its settings say or named after its model and `suffix`.

    When the run stops early, what can be resumed is kept and the rest removed; in the end the folder is let go.
    Raises `UserError` where it may not or cannot be made, or the disk is full.
    """
    config = prepared.config
    name = Path(config.base.model.rstrip("/")).name + suffix
    folder = begin(prepared.point, config.out, name, config.overwrite)
    try:
        with files.disk_errors(folder.final):
            yield folder
    except BaseException:
        if folder.working.exists() and not folder.discard_if_empty():
            say_line(say, f"stopped; go on with --resume {folder.final}")
        raise
    finally:
        folder.release()
