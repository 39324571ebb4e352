"""The steps of a run: from a prepared model to a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from qlora_kit.adapters import initialization
from qlora_kit.runs.folder import RunFolder
from qlora_kit.system.progress import INITIALIZING, LOADING, STEP, TrainingProgress, say_line
from qlora_kit.tasks import decoding
from qlora_kit.training import held_out
from qlora_kit.training.callback import RunCallback
from qlora_kit.training.prepare import Prepared
from qlora_kit.training.schedule import planned_steps
from qlora_kit.training.trainer import AdapterTrainer, build_trainer, take_over

if TYPE_CHECKING:
    from typing import Any

    from qlora_kit.memory.profile.profiler import Profiler
    from qlora_kit.memory.profile.result import MemoryProfile


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained model, still in its trainer; with it the exact matches before, and the profile where it was asked for.

    `at_once` prompts are answered at a time.
    """

    prepared: Prepared
    trainer: AdapterTrainer
    callback: RunCallback
    profile: MemoryProfile | None
    exact_match_before: float | None
    at_once: int


def fit(prepared: Prepared, folder: RunFolder, say: Console) -> Fitted:
    """Train what was `prepared`, and write metrics and checkpoints into `folder`. Raises `UserError`."""
    progress = TrainingProgress(prepared.device, say, prepared.peaks)
    _start_from_data(prepared, say)
    sample = held_out.sampler(prepared.built.model, prepared.inputs)
    trainer, callback = build_trainer(prepared, folder, progress, sample)
    at_once = held_out.prompts_at_once(prepared)
    before = _exact_match_before(prepared, at_once, say)
    profile = _train(prepared, trainer, progress)
    return Fitted(
        prepared=prepared,
        trainer=trainer,
        callback=callback,
        profile=profile,
        exact_match_before=before,
        at_once=at_once,
    )


def _start_from_data(prepared: Prepared, say: Console) -> None:
    """With EVA, turn the factors to what the model is fed, in batches of the run's size, drawn by its seed."""
    import torch

    config, device, model = prepared.config, prepared.device, prepared.built.model
    if config.adapter.init != "eva" or prepared.point is not None or config.base.full:
        return
    draw = torch.Generator().manual_seed(config.seed)
    options: Any = {"batch_size": config.optim.batch_size, "shuffle": True, "generator": draw}
    with say.status("fitting the factors to the data"), prepared.peaks.during(INITIALIZING):
        loader: Any = torch.utils.data.DataLoader(prepared.inputs.train, collate_fn=prepared.collate, **options)
        batches = ({k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in loader)
        with decoding.undisturbed(model):
            initialization.start_from_data(model, batches)


def _exact_match_before(prepared: Prepared, at_once: int, say: Console) -> float | None:
    before = held_out.exact_match(prepared, at_once)
    if before is not None:
        asked = min(prepared.config.evaluation.exact_match or 0, len(prepared.inputs.held_out))
        say_line(say, f"exact match before: {before:.1%} of {asked} held-out examples")
    return before


def _train(prepared: Prepared, trainer: AdapterTrainer, progress: TrainingProgress) -> MemoryProfile | None:
    """Take the steps that are left; gives the profile of the first ones where it was asked for."""
    point, peaks = prepared.point, prepared.peaks
    if point is not None and point.step >= planned_steps(prepared.config, len(prepared.inputs.train)):
        take_over(trainer, point.checkpoint)
        return None
    try:
        with peaks.during(STEP), _profiled(prepared, trainer) as profiler:
            trainer.train(resume_from_checkpoint=str(point.checkpoint) if point else None)
    finally:
        progress.stop()
    return profiler.profile if profiler is not None else None


@contextmanager
def _profiled(prepared: Prepared, trainer: AdapterTrainer) -> Iterator[Profiler | None]:
    """Measure the first steps where it was asked for; otherwise nothing of the profiler touches the run."""
    if not prepared.config.profile:
        yield None
        return
    from qlora_kit.memory.profile.profiler import Profiler

    peaks, device = prepared.peaks, prepared.device
    with Profiler(prepared.config, device, load_peak_bytes=peaks.peaks.get(LOADING, 0)) as profiler:
        trainer.add_callback(profiler)
        yield profiler
    if profiler.profile is not None and device.type == "cuda":
        peaks.take(STEP, profiler.profile.peak_bytes)
