"""The answers of a model to examples of its task: labels with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.runs.finished import Opened
from qlora_kit.tasks import decoding, registry
from qlora_kit.tasks.inputs import DATA, Unread, batches_of
from qlora_kit.tasks.registry import Answering, Asked, Source, Task
from qlora_kit.tasks.text2text.read import has_column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Questions:
    """Examples that wait for their answers, and their encoded rows."""

    task: Task
    answering: Answering
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Any]
    encoded: Any
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    unread: Unread


def read_questions(
    opened: Opened,
    source: str,
    columns: Mapping[str, str],
    seq_len: int | None,
    run_columns: Mapping[str, str] | None = None,
) -> Questions:
    """The examples of `source` for the task of `opened`; what they are labelled with, if anything, is not looked at.

    Without `columns` it is read by those that the run was trained with, `run_columns`, as far as it has them.
    Raises `UserError` for a model that does not predict, and for data that cannot be read.
    """
    task = registry.task_named(opened.task)
    if task.answering is None:
        rule = f"was made for {task.name}, which is not predicted"
        raise UserError.of("--data", source, rule, "Use `qlora-kit generate`.")
    tokens = data.resolve_seq_len(seq_len, opened.tokenizer, opened.positions)
    rows = data.read_rows(source, columns or run_columns or {})
    columns = columns or {part: name for part, name in (run_columns or {}).items() if _is_there(name, rows)}
    examples = task.answering.read(Source(rows, source, columns))
    encoded = task.answering.encode(examples, opened.tokenizer, tokens, opened.config)
    collate = task.collator(opened.tokenizer, tokens, opened.config)
    return Questions(
        task, task.answering, opened.tokenizer, examples, encoded, collate, {DATA: data.unread_fields(rows)}
    )


def _is_there(column: str, rows: Sequence[data.Record]) -> bool:
    return any(has_column(row.values, column) for row in rows)


def predict(
    model: Any, questions: Questions, config: RunConfig, tick: Callable[[int], None] = lambda count: None
) -> Iterator[dict[str, Any]]:
    """What is asked and what `model` answers, in the order of the examples, `batch_size` at a time."""
    batches = batches_of(questions.encoded, questions.collate, config.optim.batch_size, model.device)
    asked = Asked(questions.encoded.rows, batches, questions.tokenizer)
    with decoding.undisturbed(model):
        answers = questions.answering.answer(model, asked, config.base)
        for example, answer in zip(questions.examples, answers, strict=True):
            yield {**questions.answering.question(example), **answer}
            tick(1)
