"""The tasks: what models are trained to do, each in a folder of its own, which is imported when it is asked for.

Importing this module costs next to nothing, so that `--help` can name the tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from qlora_kit.errors import UserError, named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qlora_kit.config.settings import BaseConfig
    from qlora_kit.data.read import Record
    from qlora_kit.tasks.task import Task

FOLDERS = {  # by name; the first task is taken that fits the columns of the data
    "token-classification": "tagging",
    "question-answering": "questions",
    "text-classification": "classification",
    "text2text-generation": "text2text",
    "text-generation": "generation",
}
OF_OLD_RUNS = "text-generation"  # what a run does that names no task


@functools.cache
def _loaded(name: str) -> Task:
    task: Task = import_module(f"{__package__}.{FOLDERS[name]}.task").TASK
    assert task.name == name, f"{FOLDERS[name]} calls itself {task.name}"
    return task


def names() -> tuple[str, ...]:
    """What the tasks are called, the most general one first."""
    return tuple(reversed(FOLDERS))


def all_tasks() -> tuple[Task, ...]:
    """Every task, in the order in which they are tried."""
    return tuple(map(_loaded, FOLDERS))


def task_named(name: str | None) -> Task:
    """The task `name`; an old run that names none generates text. Raises `UserError` where there is no such task."""
    wanted = OF_OLD_RUNS if name is None else name
    if wanted not in FOLDERS:
        rule = f"is not a task; the tasks are {', '.join(names())}"
        raise UserError.of("task", name, rule, f"For example {named('task', names()[0])}.")
    return _loaded(wanted)


def task_of(config: BaseConfig, architecture: PretrainedConfig) -> Task:
    """The task of `config`, or where it is unset what the model was saved for, or else what its kind is for.

    Raises `UserError` for a task that there is not.
    """
    if config.task is not None:
        return task_named(config.task)
    saved = (task for task in all_tasks() if task.model.has_new_head and task.model.was_saved(architecture))
    usual = (task for task in all_tasks() if task.model.is_usual_for(architecture))
    return next(saved, None) or next(usual)


def choose(
    config: BaseConfig, records: list[Record], columns: Mapping[str, str], architecture: PretrainedConfig | None
) -> Task:
    """The task of `config`, or where it is unset the one that the columns fit, or else that of the model's kind.

    Columns mapped by hand count by what they are mapped to. A prompt and its completion are a source and its target to
    a model that has an encoder and a decoder. Raises `UserError` for a task that there is not.
    """
    if config.task is not None:
        return task_named(config.task)
    there = set(columns) or {column for record in records for column in record.values}
    fitting = next((task for task in _candidates(architecture) if task.fits(there)), None)
    return fitting or (task_named(None) if architecture is None else task_of(config, architecture))


def _candidates(architecture: PretrainedConfig | None) -> list[Task]:
    """The tasks in the order in which columns are tried; those for an encoder with a decoder only with such a model.

    Where the model is not known they come last.
    """
    if architecture is None:
        return sorted(all_tasks(), key=lambda task: task.model.decodes)
    return [task for task in all_tasks() if not task.model.decodes or task.model.has_class_for(architecture)]


def check_can_do(task: Task, architecture: PretrainedConfig, model: str) -> None:
    """Check that the model can do `task`. Raises `UserError` with what it can do."""
    if task.model.has_class_for(architecture):
        return
    able = [own.name for own in reversed(all_tasks()) if own.model.has_class_for(architecture)]
    remedy = "Give another model, such as a causal language model."
    if able:
        remedy = f"It can do: {named('task', ' | '.join(able))}."
    rule = f"a {architecture.model_type} model {task.model.why_unable(architecture, task.name)}"
    raise UserError.of("model", model, rule, remedy)


def serves_any_task(model_type: str) -> bool:
    """Whether there is a task that models of this type can do."""
    from transformers.models.auto import modeling_auto

    return any(model_type in getattr(modeling_auto, task.model.mapping) for task in all_tasks())


def metric_of(task: Task, metric: str | None) -> tuple[str, bool]:
    """The metric that a run follows, and whether more of it is better. Raises `UserError` for one the task has not."""
    name = task.metric if metric is None else metric
    if name not in task.metrics:
        rule = f"is not a metric of {task.name}, which has {', '.join(task.metrics)}"
        raise UserError.of("metric", name, rule, f"For example {named('metric', task.metric)}.")
    return name, task.metrics[name]
