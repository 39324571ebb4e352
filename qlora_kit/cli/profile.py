"""`qlora-kit profile`: a few real steps, every byte of them measured, beside what the plan predicted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qlora_kit.cli.flags import Command
from qlora_kit.config.rules import Checked, at_least, setting
from qlora_kit.config.settings import RunConfig

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.memory.profile.result import MemoryProfile
    from qlora_kit.runs.folder import RunFolder
    from qlora_kit.training.prepare import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileFlags(Checked):
    """The flags of this command alone."""

    steps: int = setting(3, "optimizer steps to measure", at_least(1))
    snapshot: bool = setting(False, "also write a file for PyTorch's memory viewer (CUDA only)")


SHOWN_TENSORS = 8
SNAPSHOT_FILE = "snapshot.pickle"


def run(config: RunConfig, steps: int = 3, snapshot: bool = False) -> MemoryProfile:
    """Train for `steps` optimizer steps on the longest examples, and print and write what they took.

    The run folder gets run.json, profile.json, profile.png, and with `snapshot` on CUDA a file for PyTorch's memory
    viewer; no weights. Raises `UserError`.
    """
    from rich.console import Console

    from qlora_kit.runs.folder import RUN_FILE
    from qlora_kit.system import files
    from qlora_kit.system.progress import say_line
    from qlora_kit.training.prepare import prepare, run_folder
    from qlora_kit.training.record import run_record

    console = Console(highlight=False)
    prepared = prepare(_settings(config, steps), console, measures=True)
    with run_folder(prepared, console, "-profile") as folder:
        files.write_json(folder.working / RUN_FILE, run_record(prepared))
        profile = _measure(prepared, folder, snapshot)
        picture = _write(profile, folder)
    for part in tables(profile):
        console.print(part, soft_wrap=isinstance(part, str))
    if snapshot and prepared.device.type != "cuda":
        console.print("no snapshot: PyTorch's memory viewer reads the record of CUDA's allocator, and this is a CPU")
    console.print(f"profile.json and {picture} are in {folder.final}", soft_wrap=True)
    assert prepared.planned is not None, "a profile is always planned"
    say_line(console, prepared.planned.closing_line(None, profile))
    return profile


def _settings(config: RunConfig, steps: int) -> RunConfig:
    """Those of a run that only profiles: so many steps, nothing evaluated or logged elsewhere."""
    optim = dataclasses.replace(config.optim, max_steps=steps)
    evaluation = dataclasses.replace(
        config.evaluation, eval_steps=None, exact_match=None, early_stopping=None, save_steps=None
    )
    return dataclasses.replace(config, optim=optim, evaluation=evaluation, report_to=(), resume=None)


def _measure(prepared: Prepared, folder: RunFolder, snapshot: bool) -> MemoryProfile:
    """The steps themselves; nothing is saved of them."""
    from rich.console import Console
    from transformers.trainer_utils import SaveStrategy

    from qlora_kit.memory.profile.profiler import Profiler
    from qlora_kit.system.progress import LOADING, TrainingProgress
    from qlora_kit.training.trainer import build_trainer

    progress = TrainingProgress(prepared.device, Console(stderr=True), prepared.peaks)
    trainer, _ = build_trainer(prepared, folder, progress, None)
    trainer.args.save_strategy = SaveStrategy.NO
    profiler = Profiler(
        prepared.config,
        prepared.device,
        prepared.config.optim.max_steps or 1,
        folder.working / SNAPSHOT_FILE if snapshot else None,
        load_peak_bytes=prepared.peaks.peaks.get(LOADING, 0),
    )
    try:
        with profiler:
            trainer.add_callback(profiler)
            trainer.train()
    finally:
        progress.stop()
    assert profiler.profile is not None, "a run has at least one step"
    return profiler.profile


def _write(profile: MemoryProfile, folder: RunFolder) -> str:
    """Write the profile and put `folder` in its place; gives the name of the picture."""
    from qlora_kit.training.finish import write_profile

    picture = write_profile(profile, folder)
    folder.checkpoints.rmdir()
    folder.finish()
    return picture.name


def tables(profile: MemoryProfile) -> list[Table | str]:
    """The profile for a terminal: predicted beside measured, the phases, and the largest tensors at the peak."""
    from qlora_kit.system.progress import human_bytes

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
    from rich.table import Table

    from qlora_kit.memory.report import operation_name

    table = Table("largest at the peak", "MiB", "made by", "at", box=None, padding=(0, 2, 0, 0))
    for tensor in profile.largest[:SHOWN_TENSORS]:
        table.add_row(tensor.category, _mib(tensor.n_bytes), operation_name(tensor.operation), tensor.line)
    return table


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(first, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(f"{column} (MiB)" if column != "error" else column, justify="right")
    return table


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f}"


def _share(difference: int, measured: int) -> str:
    return f"{difference / measured:+.2%}" if measured else "not measured"


COMMAND = Command(
    run=run,
    example="qlora-kit profile --model Qwen/Qwen3-0.6B --data chat.jsonl --steps 3",
    flags=ProfileFlags,
    headings=("model", "adapter", "data", "optimizer", "memory"),
)
