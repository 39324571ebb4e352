"""The end of a run: its figures, and what it leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters.base_record import TrainedBase
from qlora_kit.config.files import read_settings
from qlora_kit.config.settings import RunConfig
from qlora_kit.optim.paged_states import paged_bytes
from qlora_kit.runs import cards
from qlora_kit.runs.finished import label_map
from qlora_kit.runs.folder import CARD_FILE, LABELS_FILE, RUN_FILE, RunFolder
from qlora_kit.system import files
from qlora_kit.training import held_out
from qlora_kit.training.fit import Fitted
from qlora_kit.training.record import finished_record
from qlora_kit.training.result import RunResult
from qlora_kit.training.trainer import final_metrics, final_scores, mean_training_loss

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.memory.profile.result import MemoryProfile

PICTURE_FILE = "profile.png"


def judge(fitted: Fitted, folder: RunFolder) -> RunResult:
    """The figures of the trained model; what it takes to get them counts among the run's peaks."""
    prepared, trainer, peaks = fitted.prepared, fitted.trainer, fitted.prepared.peaks
    after = held_out.exact_match(prepared, fitted.at_once)
    metrics = final_metrics(trainer) if prepared.inputs.evaluation is not None else {}
    peaks.note()
    return RunResult(
        folder=folder.final,
        adapter=folder.final / ("model" if prepared.config.base.full else "adapter"),
        steps=trainer.state.global_step,
        train_loss=mean_training_loss(trainer),
        eval_loss=metrics.get("loss"),
        exact_match_before=fitted.exact_match_before,
        exact_match_after=after,
        peak_bytes=peaks.peaks[peaks.highest_phase],
        peak_phase=peaks.highest_phase,
        phase_peak_bytes=dict(peaks.peaks),
        paged_bytes=paged_bytes(trainer.optimizer),
        tokens_per_s=fitted.callback.tokens_per_s,
        metrics=metrics,
    )


def write(fitted: Fitted, folder: RunFolder, record: Mapping[str, Any], result: RunResult) -> list[Table]:
    """Write profile, report, weights and cards, and put `folder` in its place; gives what of the report is shown."""
    if fitted.profile is not None:
        write_profile(fitted.profile, folder)
    tables = _write_report(fitted, folder)
    _write_weights(fitted, folder, record, result)
    finished = finished_record(record, result)
    files.write_json(folder.working / RUN_FILE, finished)
    files.write_text(folder.working / result.adapter.name / CARD_FILE, cards.adapter_card(finished))
    files.write_text(folder.working / CARD_FILE, cards.run_card(finished))
    folder.finish()
    return tables


def write_profile(profile: MemoryProfile, folder: RunFolder) -> Path:
    """Write `profile` and its picture into `folder`; gives the picture."""
    from qlora_kit.memory.profile.picture import draw_profile
    from qlora_kit.memory.profile.profiler import save_profile

    picture = folder.working / PICTURE_FILE
    save_profile(profile, folder.working)
    draw_profile(profile, picture)
    return picture


def _write_report(fitted: Fitted, folder: RunFolder) -> list[Table]:
    """Write what the task says about the trained model on held-out data, and return what of it is shown."""
    inputs = fitted.prepared.inputs
    if inputs.evaluation is None or not inputs.task.has_report:
        return []
    scores = final_scores(fitted.trainer)
    inputs.task.write_report(scores, folder.working)
    return inputs.task.tables(scores)


def _write_weights(fitted: Fitted, folder: RunFolder, record: Mapping[str, Any], result: RunResult) -> None:
    """The trained weights, with the tokenizer, the labels, and what they were trained on."""
    inputs, target = fitted.prepared.inputs, folder.working / result.adapter.name
    fitted.trainer.save_model(str(target))
    inputs.tokenizer.save_pretrained(str(target))
    if inputs.config.base.labels is not None:
        files.write_json(target / LABELS_FILE, label_map(inputs.config.base))
    settings = RunConfig.from_flat(read_settings({"settings": record["settings"]})).base
    if not settings.full:
        TrainedBase.of(settings, record["base_hash"], record["resolved"]["dtype"]).write(target)
