"""What a task is to the rest of the toolkit: its data, its batches, its scores, its answers.

What it asks of a model stands in `task_models`, by the same name. A task is one file here with one `Task` in it, and
one line in each of `config.Tasks`, `task_models.TASK_MODELS` and `tasks.TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.read import Record
from qlora_kit.model.task_models import TASK_MODELS, TaskModel

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Any]
Score = Callable[[Any, "Asked", BaseConfig], "Scores"]


@dataclass(frozen=True)
class Asked:
    """What a model is asked: encoded rows, and in their order the batches of them, on the model's device.

    The batches can be gone through once.
    """

    rows: Sequence[Any]
    batches: Iterable[Batch]
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """How well a model does on held-out examples: figures by name, and for a task that has more to say its report."""

    metrics: dict[str, float]
    report: Mapping[str, Any] = field(default_factory=dict)  # plain values, ready for JSON


@dataclass(frozen=True)
class Source:
    """Records to read examples from: what the user called them, the columns mapped by hand, whose setting it is."""

    records: list[Record]
    name: str
    columns: Mapping[str, str]
    setting: str = "--data"
    learns_all: bool = False  # all of a text, and not its answers alone


@dataclass(frozen=True)
class Reader:
    """How records become encoded examples.

    An example may be anything with an `origin`; an encoded set is a map-style data set of features for `collator`, with
    `rows` (each with `input_ids`) and `report` (an `AuditReport`).
    """

    fits: Callable[[Set[str]], bool]  # whether columns of these names are data of the task
    read: Callable[[Source, BaseConfig], list[Any]]
    resolve: Callable[[BaseConfig, Sequence[Any], str], BaseConfig]  # the labels in the training examples
    encode: Callable[[RunConfig, Sequence[Any], PreTrainedTokenizerBase, int, str], Any]
    audit: Callable[[Sequence[Any], Sequence[Any]], list[tuple[str, str]]]  # lines on examples, beside training ones
    answer: Callable[[Any, Any], str]  # what an encoded row of an example learns, in words
    audit_rows: Callable[[Any], list[tuple[str, str]]] = lambda encoded: []  # lines on an encoded set
    encode_held_out: Callable[[RunConfig, Sequence[Any], PreTrainedTokenizerBase, int, str], Any] | None = None
    """`encode` for examples to score, where it is not that for those to train on."""
    columns: Callable[[Sequence[Record], dict[str, str]], dict[str, str]] = lambda records, by_hand: by_hand
    """The columns mapped by hand, or what the training records decide about them, for other data of the run too."""


@dataclass(frozen=True)
class Judge:
    """How a model is scored, what of it is shown, and what a run may follow.

    `metrics` are the figures that `--metric` may name, and whether more is better; `default` is the one it names unset.
    `write` puts the report of a model into a folder; `tables` are what of it is shown.
    """

    score: Score
    metrics: Mapping[str, bool]
    default: str
    said: Callable[[Mapping[str, float]], str]
    write: Callable[[Scores, Path], None] | None = None
    tables: Callable[[Scores], list[Table]] = lambda scores: []


@dataclass(frozen=True)
class Answering:
    """How `predict` answers: the examples without their answers, and a line of JSON for each of them, in their order.

    An example may be encoded as several rows, which then follow each other.
    """

    read: Callable[[Source], list[Any]]
    encode: Callable[[Sequence[Any], PreTrainedTokenizerBase, int, BaseConfig], Any]
    answer: Callable[[Any, Asked, BaseConfig], Iterator[dict[str, Any]]]
    question: Callable[[Any], dict[str, Any]]  # what an answer repeats of its example


@dataclass(frozen=True)
class Proving:
    """What a release is asked: an encoded row, and what is right for each row of the logits that come of it."""

    inputs: Callable[[Any], dict[str, list[int]]]  # what the model is called with
    answers: Callable[[Any], list[int]]  # numbers of choices, −100 where none is known
    built_in: Callable[[Sequence[str]], list[Any]]  # unlabelled examples of texts, where no data can be read


@dataclass(frozen=True)
class Task:
    """A task. `collator` makes batches of an encoded set's features; `weights` are those of the labels in the loss."""

    name: str
    reader: Reader
    judge: Judge
    collator: Callable[[PreTrainedTokenizerBase, int, BaseConfig], Callable[[Sequence[Any]], Batch]]
    answering: Answering | None = None
    proving: Proving | None = None
    weights: Callable[[Any, BaseConfig], torch.Tensor] | None = None

    @property
    def model(self) -> TaskModel:
        """What it asks of a model."""
        return TASK_MODELS[self.name]
