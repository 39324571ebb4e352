"""The answers of a model to examples of its task: labels with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit import data, scoring, tasks
from qlora_kit.config import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.reopening import Opened
from qlora_kit.tasks import Answering, Source, Task


@dataclass(frozen=True)
class Questions:
    """Examples that wait for their answers, and their tokens."""

    task: Task
    answering: Answering
    examples: Sequence[Any]
    encoded: Any
    collate: Callable[[Sequence[Any]], dict[str, Any]]


def read_questions(opened: Opened, source: str, columns: Mapping[str, str], seq_len: int | None) -> Questions:
    """The examples of `source` for the task of `opened`; what they are labelled with, if anything, is not looked at.

    Raises `UserError` for a model that does not predict, and for data that cannot be read.
    """
    task = tasks.task_named(opened.task)
    if task.answering is None:
        rule = f"was made for {task.name}, which is not predicted"
        raise UserError.of("--data", source, rule, "Use `qlora-kit generate`.")
    tokens = data.resolve_seq_len(seq_len, opened.tokenizer, opened.positions)
    rows = data.read_rows(source, columns)
    examples = task.answering.read(Source(rows, source, columns))
    encoded = task.answering.encode(examples, opened.tokenizer, tokens)
    return Questions(task, task.answering, examples, encoded, task.collator(opened.tokenizer, tokens, opened.config))


def predict(
    model: Any, questions: Questions, config: RunConfig, tick: Callable[[int], None] = lambda count: None
) -> Iterator[dict[str, Any]]:
    """What is asked and what `model` answers, in the order of the examples, `batch_size` at a time."""
    size, examples = config.optim.batch_size, questions.examples
    with scoring.undisturbed(model):
        for start in range(0, len(examples), size):
            rows = [questions.encoded[index] for index in range(start, min(start + size, len(examples)))]
            batch = {name: tensor.to(model.device) for name, tensor in questions.collate(rows).items()}
            answers = questions.answering.answer(model, batch, config.base)
            for example, answer in zip(examples[start : start + size], answers, strict=True):
                yield {**questions.answering.question(example), **answer}
            tick(len(rows))
