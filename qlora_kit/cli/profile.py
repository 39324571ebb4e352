"""`qlora-kit profile`: a few real steps, every byte of them measured, beside what the plan predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qlora_kit import build, data
from qlora_kit.config.settings import RunConfig
from qlora_kit.memory import preflight
from qlora_kit.runs.folder import RUN_FILE, RunFolder
from qlora_kit.system import files, quiet
from qlora_kit.system.progress import LOADING, PhasePeaks, human_bytes, say_line
from qlora_kit.tasks.decoding import NOTHING_HELD_OUT

if TYPE_CHECKING:
    from qlora_kit.memory.profile.result import MemoryProfile
    from qlora_kit.runs.inputs import Inputs

SHOWN_TENSORS = 8
PICTURE_FILE = "profile.png"
SNAPSHOT_FILE = "snapshot.pickle"


def run(config: RunConfig, steps: int = 3, snapshot: bool = False) -> MemoryProfile:
    """Train for `steps` optimizer steps on the longest examples, and print and write what they took.

    The run folder gets run.json, profile.json, profile.png, and with `snapshot` on CUDA a file for PyTorch's memory
    viewer; no weights. Raises `UserError`.
    """
    from qlora_kit.adapters import unquantized
    from qlora_kit.memory.profile.picture import draw_profile
    from qlora_kit.memory.profile.profiler import save_profile
    from qlora_kit.model.device import resolve_device
    from qlora_kit.optim.optimizers import resolve_optim
    from qlora_kit.runs import messages
    from qlora_kit.runs.inputs import check_vocabulary, read_inputs
    from qlora_kit.training.run import _kept_or_discarded, _record, check_settings

    console = Console(highlight=False)
    config = _settings(config, steps)
    check_settings(config)
    device = resolve_device(config.base.device)
    if config.out is not None:
        RunFolder.at(Path(config.out)).check_place(config.overwrite)
    quiet.quiet_progress_bars()
    inputs = read_inputs(config)
    asked, config = config, inputs.config  # its task and labels, where the data say them
    for line in [*messages.task_lines(asked.base, config.base), *messages.unread_lines(inputs.unread)]:
        say_line(console, line)
    inputs = dataclasses.replace(inputs, train=_longest(inputs.train, _rows(config)), evaluation=None, held_out=[])
    planned = preflight.plan_run(config, device, inputs.longest_row, checks=config.preflight, held_out=NOTHING_HELD_OUT)
    config = dataclasses.replace(config, lean=planned.lean)
    peaks = PhasePeaks(device)
    with peaks.during(LOADING):
        model = build.build_model(config, device)
    for line in messages.unquantized_lines(unquantized.of_run(config, model), config.base.bits):
        say_line(console, line)
    check_vocabulary(inputs.tokenizer, model)
    name = Path(config.base.model.rstrip("/")).name
    folder = RunFolder.create(config.out, f"{name}-profile", config.overwrite)
    with _kept_or_discarded(folder, console), files.disk_errors(folder.final):
        record = _record(config, device, model, inputs, resolve_optim(config, device))
        files.write_json(folder.working / RUN_FILE, record)
        profile = _profile(config, folder, model, inputs, peaks, snapshot)
        save_profile(profile, folder.working)
        draw_profile(profile, folder.working / PICTURE_FILE)
        folder.checkpoints.rmdir()
        folder.finish()
    for part in tables(profile):
        console.print(part, soft_wrap=isinstance(part, str))
    if snapshot and device.type != "cuda":
        console.print("no snapshot: PyTorch's memory viewer reads the record of CUDA's allocator, and this is a CPU")
    console.print(f"profile.json and {PICTURE_FILE} are in {folder.final}", soft_wrap=True)
    say_line(console, planned.closing_line(None, profile))
    return profile


def _settings(config: RunConfig, steps: int) -> RunConfig:
    """Those of a run that only profiles: so many steps, nothing evaluated or logged elsewhere."""
    optim = dataclasses.replace(config.optim, max_steps=steps)
    evaluation = dataclasses.replace(
        config.evaluation, eval_steps=None, exact_match=None, early_stopping=None, save_steps=None
    )
    return dataclasses.replace(config, optim=optim, evaluation=evaluation, report_to=(), resume=None)


def _rows(config: RunConfig) -> int:
    assert config.optim.max_steps is not None, "a profile has a number of steps"
    return config.optim.batch_size * config.optim.grad_accum * config.optim.max_steps


def _longest(rows: Any, count: int) -> Any:
    """The `count` longest rows, over again where there are fewer: the most that a step of this run can take."""
    by_length: list[Any]
    if isinstance(rows, data.PackedSet):
        by_length = sorted(rows.rows, key=lambda row: -sum(len(example.input_ids) for example in row))
    else:
        by_length = sorted(rows.rows, key=lambda row: -len(row.input_ids) - len(getattr(row, "labels", None) or ()))
    repeats = -(-count // len(by_length))
    return dataclasses.replace(rows, rows=(by_length * repeats)[:count])


def _profile(
    config: RunConfig, folder: RunFolder, model: Any, inputs: Inputs, peaks: PhasePeaks, snapshot: bool
) -> MemoryProfile:
    from transformers.trainer_utils import SaveStrategy

    from qlora_kit.memory.profile.profiler import Profiler
    from qlora_kit.runs.inputs import make_collator
    from qlora_kit.system.progress import TrainingProgress
    from qlora_kit.training.trainer import build_trainer

    progress = TrainingProgress(model.device, Console(stderr=True), peaks)
    trainer, _ = build_trainer(
        config,
        folder,
        model.device,
        model,
        dataclasses.replace(inputs, evaluation=None),
        make_collator(model, inputs),
        progress,
        None,
        None,
    )
    trainer.args.save_strategy = SaveStrategy.NO
    file = folder.working / SNAPSHOT_FILE if snapshot else None
    try:
        load_peak_bytes = peaks.peaks.get(LOADING, 0)
        with Profiler(
            config, model.device, config.optim.max_steps or 1, file, load_peak_bytes=load_peak_bytes
        ) as profiler:
            trainer.add_callback(profiler)
            trainer.train()
    finally:
        progress.stop()
    assert profiler.profile is not None, "a run has at least one step"
    return profiler.profile


def tables(profile: MemoryProfile) -> list[Table | str]:
    """The profile for a terminal: predicted beside measured, the phases, and the largest tensors at the peak."""
    where = profile.phase if profile.block is None else f"{profile.phase}, block {profile.block}"
    lines: list[Table | str] = [
        f"peak {human_bytes(profile.peak_bytes)} measured on {profile.device} ({profile.basis}), at {where}, "
        f"{profile.rows} x {profile.tokens} tokens, {profile.steps} steps"
    ]
    if profile.predicted is not None:
        lines += [f"predicted: {profile.predicted.basis}", _components(profile)]
    lines += [_phases(profile), _largest(profile)]
    return lines


def _components(profile: MemoryProfile) -> Table:
    assert profile.predicted is not None, "asked for only with a prediction"
    table = _table("at the peak", "predicted", "measured", "error")
    for name, error in profile.component_errors().items():
        measured, predicted = profile.components.get(name, 0), profile.predicted.components.get(name, 0)
        table.add_row(name, _mib(predicted), _mib(measured), _share(error, measured))
    difference = profile.predicted.peak_bytes - profile.peak_bytes
    measured = profile.peak_bytes
    table.add_row("in all", _mib(profile.predicted.peak_bytes), _mib(measured), _share(difference, measured))
    return table


def _phases(profile: MemoryProfile) -> Table:
    table = _table("highest in each phase", "predicted", "measured", "reserved")
    predicted = {} if profile.predicted is None else profile.predicted.phases
    for name, point in profile.phases.items():
        counter = profile.counters.get(name)
        reserved = "" if counter is None else _mib(counter.reserved_bytes)
        foreseen = _mib(predicted[name]) if name in predicted else ""
        table.add_row(name, foreseen, _mib(point.live_bytes), reserved)
    return table


def _largest(profile: MemoryProfile) -> Table:
    from qlora_kit.memory.report import operation_name

    table = Table("largest at the peak", "MiB", "made by", "at", box=None, padding=(0, 2, 0, 0))
    for tensor in profile.largest[:SHOWN_TENSORS]:
        table.add_row(tensor.category, _mib(tensor.n_bytes), operation_name(tensor.operation), tensor.line)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(f"{column} (MiB)" if column != "error" else column, justify="right")
    return table


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f}"


def _share(difference: int, measured: int) -> str:
    return f"{difference / measured:+.2%}" if measured else "not measured"
