"""Whether a run may go on with these settings: it must become the run that its `run.json` describes.

So a setting may only be another where a run without interruption, with the new one, had come to the same checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.config.files import read_settings
from qlora_kit.config.settings import LeanConfig, RunConfig, settings
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.runs import folder

if TYPE_CHECKING:
    import torch

REMEDY = "Leave it as it was, or start a new run."
FROM_DATA = ("task", "labels", "multi_label")  # settings of the base that unset are taken from the data
FREE = {  # change nothing of the steps: where and how they are computed, and what is kept or written of them
    *("device", "allow_16_bit_experts", "gradient_checkpointing"),
    *("eval_steps", "save_steps", "keep_checkpoints", "keep_best", "early_stopping", "exact_match"),
    *("out", "overwrite", "resume", "preflight", "profile", "report_to"),
    *(piece.name for piece in dataclasses.fields(LeanConfig)),
} - {"lean", "flat_buffer"}  # by which the optimizer's states are those of factors or of one buffer
BY_RULE = {"optim", "max_steps", "epochs", "eval_data"}  # may be others where that changes no step so far


def settings_before(point: folder.ResumePoint) -> RunConfig:
    """The settings of the run that `point` belongs to."""
    return RunConfig.from_flat(read_settings(_read(point)))


def _read(point: folder.ResumePoint) -> dict[Any, Any]:
    record: dict[Any, Any] = json.loads(point.settings_file.read_text(encoding="utf-8"))
    return record


def as_before(config: RunConfig, point: folder.ResumePoint) -> RunConfig:
    """`config` with what the run to resume took from its data, where it is unset."""
    before = settings_before(point).base
    unset = {name: getattr(before, name) for name in FROM_DATA if getattr(config.base, name) is None}
    return dataclasses.replace(config, base=dataclasses.replace(config.base, **unset))


def check_resumable(config: RunConfig, point: folder.ResumePoint, device: torch.device) -> None:
    """Check that what the checkpoint depends on is as it was. Raises `UserError` with every difference."""
    record, before = _read(point), settings_before(point)
    faults = [*_changed(before, config), *_other_optimizer(record, config, device)]
    faults += _other_length(before, config, point, record["examples"]["train"])
    if faults:
        raise UserError(faults)


def _changed(before: RunConfig, now: RunConfig) -> Iterator[Fault]:
    for group, field, _ in settings():
        if field.name in FREE | BY_RULE:
            continue
        old, new = (getattr(getattr(config, group) if group else config, field.name) for config in (before, now))
        if old != new:
            yield Fault(field.name, new, f"was {old!r} in the run to resume", REMEDY)


def _other_optimizer(record: Mapping[str, Any], now: RunConfig, device: torch.device) -> Iterator[Fault]:
    """The optimizer is what it resolves to: unset, it is another on another device."""
    from qlora_kit.optim.optimizers import resolve_optim

    old, new = record["resolved"]["optim"], resolve_optim(now, device)
    if old != new:
        remedy = f"Add {named('optim', old)}, whose states the checkpoint holds, or start a new run."
        yield Fault("optim", new, f"was {old!r} in the run to resume", remedy)


def _other_length(before: RunConfig, now: RunConfig, point: folder.ResumePoint, rows: int) -> Iterator[Fault]:
    """A run may get longer or shorter where the learning rates of the steps so far, and of the next, stay."""
    from qlora_kit.training.schedule import planned_steps, share_of_rate

    names = [name for name in ("max_steps", "epochs") if getattr(before.optim, name) != getattr(now.optim, name)]
    if not names:
        return
    name, steps = names[0], planned_steps(now, rows)
    value, was = (getattr(config.optim, name) for config in (now, before))
    if name == "epochs" and now.optim.max_steps is not None:
        rule = f"has no effect: the run to resume has {named('max_steps', now.optim.max_steps)}"
        yield Fault(name, value, rule, f"Give {named('max_steps')} instead.")
        return
    if steps < point.step:
        rule = f"ends at step {steps}, and the checkpoint is of step {point.step}"
        yield Fault(name, value, rule, "Give more, or resume an older checkpoint.")
        return
    rates = ([share_of_rate(now.optim, total, n) for n in range(point.step + 1)] for total in (point.total, steps))
    if next(rates) != next(rates):
        rule = (
            f"was {was!r} in the run to resume, and with {named('schedule', now.optim.schedule)} another number of "
            "steps gives the steps already taken other learning rates"
        )
        remedy = f"{REMEDY} One with {named('schedule', 'constant')} can be made longer afterwards."
        yield Fault(name, value, rule, remedy)


def check_held_out(config: RunConfig, point: folder.ResumePoint, digest: str) -> None:
    """Check that the best checkpoint so far was chosen on the held-out examples that `digest` is of.

    Raises `UserError` where it was not, and the rest of the run would compare it with others.
    """
    follows = config.evaluation.keep_best or config.evaluation.early_stopping is not None
    if not follows or point.best_metric is None:
        return
    record, before = _read(point), settings_before(point)
    same = (
        digest == record["held_out_hash"]
        if "held_out_hash" in record
        else before.data.eval_data == config.data.eval_data
    )
    if not same:
        rule = "gives other held-out examples than those that the best checkpoint so far was chosen on"
        remedy = f"Leave it as it was, or add {named('keep_best', False)} and no {named('early_stopping')}."
        raise UserError.of("eval_data", config.data.eval_data, rule, remedy)
