"""The tasks: what models are trained to do, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError, named
from qlora_kit.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDERS = (  # the first task is taken that fits the columns of the data
    "tagging",
    "questions",
    "classification",
    "text2text",
    "generation",
)
TASKS: tuple[Task, ...] = tuple(import_module(f"{__package__}.{folder}.task").TASK for folder in FOLDERS)
OF_OLD_RUNS = "text-generation"  # what a run does that names no task


def names() -> tuple[str, ...]:
    """What the tasks are called, the most general one first."""
    return tuple(task.name for task in reversed(TASKS))


def task_named(name: str | None) -> Task:
    """The task `name`; an old run that names none generates text. Raises `UserError` where there is no such task."""
    wanted = name or OF_OLD_RUNS
    found = next((task for task in TASKS if task.name == wanted), None)
    if found is None:
        rule = f"is not a task: there are {', '.join(names())}"
        raise UserError.of("task", name, rule, f"For example {named('task', names()[0])}.")
    return found


def check_name(name: object) -> None:
    """Check a name that may be unset, as one of several settings. Raises `UserError` where there is no such task."""
    if name is not None:
        task_named(str(name))


def task_of(config: BaseConfig, architecture: PretrainedConfig) -> Task:
    """The task of `config`, or where it is unset what the model was saved for, or else what its kind is for.

    Raises `UserError` for a task that there is not.
    """
    if config.task is not None:
        return task_named(config.task)
    saved = (task for task in TASKS if task.model.has_new_head and task.model.was_saved(architecture))
    usual = (task for task in TASKS if task.model.is_usual_for(architecture))
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
        return sorted(TASKS, key=lambda task: task.model.decodes)
    return [task for task in TASKS if not task.model.decodes or task.model.has_class_for(architecture)]


def check_can_do(task: Task, architecture: PretrainedConfig, model: str) -> None:
    """Check that the model can do `task`. Raises `UserError` with what it can do."""
    if task.model.has_class_for(architecture):
        return
    able = [own.name for own in reversed(TASKS) if own.model.has_class_for(architecture)]
    remedy = "Give another model, such as a causal language model."
    if able:
        remedy = f"It can do: {named('task', ' | '.join(able))}."
    rule = f"a {architecture.model_type} model {task.model.why_unable(architecture, task.name)}"
    raise UserError.of("model", model, rule, remedy)


def serves_any_task(model_type: str) -> bool:
    """Whether there is a task that models of this type can do."""
    from transformers.models.auto import modeling_auto

    return any(model_type in getattr(modeling_auto, task.model.mapping) for task in TASKS)


def metric_of(task: Task, metric: str | None) -> tuple[str, bool]:
    """The metric that a run follows, and whether more of it is better. Raises `UserError` for one the task has not."""
    name = task.metric if metric is None else metric
    if name not in task.metrics:
        rule = f"is no metric of {task.name}, which has {', '.join(task.metrics)}"
        raise UserError.of("metric", name, rule, f"For example {named('metric', task.metric)}.")
    return name, task.metrics[name]
