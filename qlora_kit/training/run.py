"""The training run, from settings to a finished run folder: prepare, fit, judge, write."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.config.settings import RunConfig
from qlora_kit.memory import preflight
from qlora_kit.runs import messages
from qlora_kit.runs.folder import RUN_FILE, RunFolder
from qlora_kit.runs.inputs import Examples
from qlora_kit.system import files, quiet
from qlora_kit.system.progress import say_line
from qlora_kit.training import held_out
from qlora_kit.training.prepare import Prepared, prepare, run_folder
from qlora_kit.training.record import run_record
from qlora_kit.training.result import RunResult

if TYPE_CHECKING:
    from qlora_kit.training.fit import Fitted

__all__ = ["RunResult", "train"]

PLAN_FILE = "plan.json"


def train(config: RunConfig, console: Console | None = None, examples: Examples | None = None) -> RunResult:
    """Run the training that `config` describes and return where it is and how it went.

    Progress goes to `console` (standard error by default). `examples` stand in the place of the data that the
    settings name, as the folds of a search do. Everything that can be wrong with the settings, the
    model or the data is found before anything is written. Raises `UserError`.
    """
    quiet.quiet_libraries()
    say = console if console is not None else Console(stderr=True)
    prepared = prepare(config, say, examples)
    with run_folder(prepared, say) as folder:
        files.require_space(folder.working, _needed_bytes(prepared))
        if prepared.planned is not None and prepared.planned.plan is not None:
            files.write_json(folder.working / PLAN_FILE, prepared.planned.plan.to_dict())
        return _run(prepared, folder, say)


def _run(prepared: Prepared, folder: RunFolder, say: Console) -> RunResult:
    from qlora_kit.training.finish import judge, write
    from qlora_kit.training.fit import fit

    record = _begin_record(prepared, folder, say)
    fitted = fit(prepared, folder, say)
    result = judge(fitted, folder)
    for table in write(fitted, folder, record, result):
        say.print(table)
    _say_end(fitted, result, say)
    return result


def _needed_bytes(prepared: Prepared) -> int:
    """Space for the trained weights and the checkpoints with their optimizer states: two moments, at most fp32."""
    from qlora_kit.adapters import inject, parts

    model = prepared.built.model
    weights = sum(p.nbytes for _, p in inject.trainable(model)) + parts.frozen_bytes(model)
    states = sum(8 * p.numel() for _, p in inject.trainable(model))
    return weights + (prepared.config.evaluation.keep_checkpoints + 1) * (weights + states)


def _begin_record(prepared: Prepared, folder: RunFolder, say: Console) -> dict[str, Any]:
    """Write `run.json` as far as it is known, and say what trains on what."""
    with say.status("hashing the base"):
        record = run_record(prepared)
    files.write_json(folder.working / RUN_FILE, record)
    for line in messages.overview(record):
        say_line(say, line)
    return record


def _say_end(fitted: Fitted, result: RunResult, say: Console) -> None:
    """How it went, and what the run would have taken on a GPU."""
    prepared, planned = fitted.prepared, fitted.prepared.planned
    for line in messages.closing(dataclasses.asdict(result), prepared.inputs.task):
        say_line(say, line)
    if planned is None and fitted.profile is not None:
        config, inputs = prepared.config, prepared.inputs
        lengths = held_out.lengths(config, inputs)
        planned = preflight.plan_run(config, prepared.device, inputs.longest_row, checks=False, held_out=lengths)
    if planned is not None:
        measured = prepared.peaks.peaks if prepared.device.type == "cuda" else None
        say_line(say, planned.closing_line(measured, fitted.profile))
