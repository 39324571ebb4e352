"""The tasks: what models are trained to do, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_kit.config.rules import flag
from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.model.task_models import GENERATION, TEXT2TEXT, can_do, task_of
from qlora_kit.tasks.classification import task as classification
from qlora_kit.tasks.generation import task as generation
from qlora_kit.tasks.questions import task as questions
from qlora_kit.tasks.tagging import task as tagging
from qlora_kit.tasks.task import Answering, Asked, Judge, Proving, Scores, Source, Task
from qlora_kit.tasks.text2text import task as text2text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "TASKS",
    "Answering",
    "Asked",
    "Judge",
    "Proving",
    "Scores",
    "Source",
    "Task",
    "choose",
    "metric_of",
    "task_named",
]

TASKS: tuple[Task, ...] = (  # the first one is taken that fits the columns of the data
    tagging.TASK,
    questions.TASK,
    classification.TASK,
    text2text.TASK,
    generation.TASK,
)


def task_named(name: str | None) -> Task:
    """The task `name`; an old run that names none generates text."""
    return next(task for task in TASKS if task.name == (name or GENERATION))


def choose(
    config: BaseConfig, records: list[Record], columns: Mapping[str, str], architecture: PretrainedConfig | None
) -> Task:
    """The task of `config`, or where it is unset the one that the columns fit, or else that of the model's kind.

    Columns mapped by hand count by what they are mapped to. A prompt and its completion are a source and its target to
    a model that has an encoder and a decoder.
    """
    if config.task is not None:
        return task_named(config.task)
    there = set(columns) or {column for record in records for column in record.values}
    fitting = next((task for task in _candidates(architecture) if task.reader.fits(there)), None)
    return fitting or task_named(None if architecture is None else task_of(None, architecture))


def _candidates(architecture: PretrainedConfig | None) -> list[Task]:
    """The tasks in the order in which columns are tried; where the model is not known text to text comes last."""
    if architecture is None:
        return sorted(TASKS, key=lambda task: task.name == TEXT2TEXT)
    return [task for task in TASKS if task.name != TEXT2TEXT or can_do(TEXT2TEXT, architecture)]


def metric_of(task: Task, metric: str | None) -> tuple[str, bool]:
    """The metric that a run follows, and whether more of it is better. Raises `UserError` for one the task has not."""
    name = task.judge.default if metric is None else metric
    if name not in task.judge.metrics:
        rule = f"is no metric of {task.name}, which has {', '.join(task.judge.metrics)}"
        raise UserError.of(flag("metric"), name, rule, f"For example --metric {task.judge.default}.")
    return name, task.judge.metrics[name]
