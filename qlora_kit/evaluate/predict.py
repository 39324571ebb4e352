"""The answers of a model to examples of its task: labels with their scores, texts, parts of contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.data.mapped_columns import has_column
from qlora_kit.errors import UserError
from qlora_kit.runs.finished import Opened
from qlora_kit.runs.inputs import DATA, Unread, batches_of
from qlora_kit.tasks import decoding
from qlora_kit.tasks.task import Asked, Collate, Source, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ToAnswer:
    """Examples that wait for their answers, and their encoded rows."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Any]
    encoded: Any
    collate: Collate
    unread: Unread


def read_examples(
    opened: Opened,
    source: str,
    columns: Mapping[str, str],
    seq_len: int | None,
    run_columns: Mapping[str, str] | None = None,
) -> ToAnswer:
    """The examples of `source` for the task of `opened`; what they are labelled with, if anything, is not looked at.

    Without `columns` it is read by those that the run was trained with, `run_columns`, as far as it has them.
    Raises `UserError` for a model that does not predict, and for data that cannot be read.
    """
    task = opened.task
    if not task.is_predicted:
        raise UserError.of(
            "data", source, f"was made for {task.name}, which is not predicted", "Use `qlora-kit generate`."
        )
    tokens = data.resolve_seq_len(seq_len, opened.tokenizer, opened.positions)
    rows = data.read_rows(source, columns or run_columns or {})
    columns = columns or {part: name for part, name in (run_columns or {}).items() if _is_there(name, rows)}
    examples = task.read_unanswered(Source(records=rows, name=source, columns=columns))
    return ToAnswer(
        task=task,
        tokenizer=opened.tokenizer,
        examples=examples,
        encoded=task.encode_unanswered(examples, opened.tokenizer, tokens, opened.config),
        collate=task.collator(opened.tokenizer, tokens),
        unread={DATA: data.unread_fields(rows)},
    )


def _is_there(column: str, rows: Sequence[data.Record]) -> bool:
    return any(has_column(row.values, column) for row in rows)


def predict(
    model: Any, asked: ToAnswer, batch_size: int, tick: Callable[[int], None] = lambda count: None
) -> Iterator[dict[str, Any]]:
    """What is asked and what `model` answers, in the order of the examples, `batch_size` at a time."""
    batches = batches_of(asked.encoded, asked.collate, batch_size, model.device)
    with decoding.undisturbed(model):
        answers = asked.task.answers(model, Asked(asked.encoded.rows, batches, asked.tokenizer))
        for example, answer in zip(asked.examples, answers, strict=True):
            yield {**asked.task.question(example), **answer}
            tick(1)
