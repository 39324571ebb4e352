"""What a task is to the rest of the toolkit: its data, its batches, its scores, its answers.

A task is a folder here whose `task.py` holds a subclass of `Task` and an instance of it, `TASK`, and one line in
`registry.FOLDERS`. What it asks of a model is its `TaskModel`. Nobody outside asks which task it is: they call these
methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit import data
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport
from qlora_kit.data.read import Record
from qlora_kit.tasks.decoding import AnswerLengths
from qlora_kit.tasks.evaluation import Evaluation, Scores
from qlora_kit.tasks.proof import ProofRow, ProofTerms, whole_within
from qlora_kit.tasks.report import length_lines, write_scores
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

Batch = dict[str, Any]
Collate = Callable[[Sequence[Any]], Batch]
NO_FIGURES = ("loss", "perplexity", "tokens", "examples")  # of an evaluation, which say how well, and on how much
Lines = list[tuple[str, str]]  # of an audit: what, and how much


@dataclass(frozen=True)
class Asked:
    """What a model is asked: encoded rows, and in their order the batches of them, on the model's device.

    The batches can be gone through once.
    """

    rows: Sequence[Any]
    batches: Iterable[Batch]
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records to read examples from: what the user called them, the columns mapped by hand, whose setting it is."""

    records: list[Record]
    name: str
    columns: Mapping[str, str]
    setting: str = "data"
    learns_all: bool = False  # all of a text, and not its answers alone


@dataclass(frozen=True)
class SampledPrompt:
    """A held-out example whose answer a run shows at each evaluation, and the tokens of its prompt."""

    expected: str
    input_ids: list[int]


class Task(ABC):
    """A task. What is abstract each task says; the rest are what most do.

    An example may be any dataclass with an `origin`; an encoded set is a map-style data set of features for `collator`,
    with `rows` (each with `input_ids`, `origin`, `truncated` and `full_tokens`) and `report` (an `AuditReport`).
    """

    name: ClassVar[str]
    model: ClassVar[TaskModel]
    metrics: ClassVar[Mapping[str, bool]]  # the figures that `metric` may name, and whether more is better
    metric: ClassVar[str]  # the one that a run follows unless told
    settings: ClassVar[frozenset[str]] = frozenset()  # those that only some tasks have, and this one has
    row_unit: ClassVar[str] = "examples"  # what a training row is
    is_predicted: ClassVar[bool] = True  # by `predict`, example by example; else `generate` asks it with free prompts
    is_announced: ClassVar[bool] = True  # at the beginning of a run, with its labels
    scores_base: ClassVar[bool] = False  # whether a base says something before it is trained
    has_report: ClassVar[bool] = True  # whether a run writes one of its model
    has_pipeline: ClassVar[bool] = False  # whether transformers has one of its name
    proof_terms: ClassVar[ProofTerms]
    pair_advice: ClassVar[str | None] = None  # how two texts are given, where the tokenizer puts nothing between them

    @property
    def preview_title(self) -> str:
        """The line above the examples that `preview` shows."""
        return f"{self.name}: the tokens that the model reads, and the answer that it learns."

    # ----------------------------------------------------------------------------------------------------- reading

    @abstractmethod
    def fits(self, columns: Set[str]) -> bool:
        """Whether columns of these names are data of the task."""

    @abstractmethod
    def read(self, source: Source, config: BaseConfig) -> list[Any]:
        """The examples in the records of `source`. Raises `UserError` with every fault, each with file and line."""

    @abstractmethod
    def read_unanswered(self, source: Source) -> list[Any]:
        """The same, where what is to be answered may be missing, and is not looked at."""

    @abstractmethod
    def resolve(self, config: BaseConfig, examples: Sequence[Any], setting: str) -> BaseConfig:
        """`config` with what the training `examples` decide, the task itself and its labels. Raises `UserError`."""

    def columns(self, records: Sequence[Record], by_hand: dict[str, str]) -> dict[str, str]:
        """The columns mapped by hand, or what training records decide about them, for other data of the run too."""
        return by_hand

    # ---------------------------------------------------------------------------------------------------- encoding

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Make `tokenizer` fit for the task, in place, and return it. Raises `UserError`."""
        return data.prepare_tokenizer(tokenizer, generates=False)

    @abstractmethod
    def encode(
        self,
        config: RunConfig,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> Any:
        """The encoded set of `examples` to train on, cut at `seq_len`. Raises `UserError`, said of `setting`."""

    def encode_held_out(
        self,
        config: RunConfig,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> Any:
        """The same of examples to score."""
        return self.encode(config, examples, tokenizer, seq_len, setting)

    @abstractmethod
    def encode_unanswered(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> Any:
        """The same of examples to answer; an example may be encoded as several rows, which follow each other."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """What makes batches of an encoded set's features."""

    def label_weights(self, rows: Any, config: BaseConfig) -> torch.Tensor:
        """The weights (L,) of the labels in the loss, from an encoded set; only with `class_weights` in `settings`."""
        raise NotImplementedError(f"{self.name} has no weights of labels")

    def is_plain_text(self, examples: Sequence[Any]) -> bool:
        """Whether none of the training `examples` went through a chat template, though the task has one."""
        return False

    # ------------------------------------------------------------------------------------------- audit and preview

    def audit(self, examples: Sequence[Any], training: Sequence[Any]) -> Lines:
        """Lines on `examples`, beside the `training` ones (the same object where it is about them)."""
        return []

    def audit_rows(self, encoded: Any) -> Lines:
        """Lines on the rows of an encoded set."""
        return []

    def length_lines(self, encoded: Any, seq_len: int) -> Lines:
        """How long the rows of an encoded set are, which were cut at `seq_len`."""
        return length_lines(encoded.report, seq_len)

    def summary(self, encoded: Any, seq_len: int) -> Lines:
        """What an audit says of an encoded set beside the number of examples: lengths, and what is odd."""
        report: AuditReport = encoded.report
        odd = [("empty texts", str(report.empty)), ("duplicates", str(report.duplicates))]
        return [*self.length_lines(encoded, seq_len), *odd, *self.audit_rows(encoded)]

    def encode_to_show(
        self,
        config: RunConfig,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> Any:
        """An encoded set to look at: of data that training might refuse too."""
        return self.encode_unanswered(examples, tokenizer, seq_len, config.base)

    def rows_to_show(
        self, config: RunConfig, example: Any, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Sequence[Any]:
        """The rows of one example."""
        rows: Sequence[Any] = self.encode_to_show(config, [example], tokenizer, seq_len, "data").rows
        return rows

    def learned_tokens(self, row: Any) -> Sequence[bool] | None:
        """Which tokens of a row are learned; None where it is something else that is."""
        return None

    @abstractmethod
    def learned(self, example: Any, row: Any, show: Callable[[int], str]) -> str:
        """What a row learns beside its tokens, marked with «»; `show` gives a token as text. Empty: nothing."""

    # ----------------------------------------------------------------------------------------------------- scoring

    @abstractmethod
    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """How well `model` does. It is left as it was, and the random state too."""

    @abstractmethod
    def said(self, metrics: Mapping[str, float]) -> str:
        """The figures of an evaluation in a line."""

    def figures(self, metrics: Mapping[str, float]) -> list[str]:
        """The figures beside the loss, in words; by default they are shares."""
        return [f"{name} {value:.1%}" for name, value in metrics.items() if name not in NO_FIGURES]

    def write_report(self, scores: Scores, folder: Path) -> None:
        """Put what there is to say of a trained model into `folder`; only where the task `has_report`."""
        write_scores(scores, folder)

    def tables(self, scores: Scores) -> list[Table]:
        """What of it is shown."""
        return []

    def evaluation_lines(self, evaluation: Evaluation) -> list[RenderableType]:
        """What `eval` prints, lines of text and tables: the data, and for each model its figures and its report."""
        lines: list[RenderableType] = [
            f"data: {evaluation.source}, for {self.name}, at most {evaluation.seq_len} tokens each"
        ]
        lines += [] if evaluation.warning is None else [evaluation.warning]
        truncated = evaluation.encoded.report.truncated
        cut = f"; {truncated:,} are cut" if truncated else ""
        for name, own in evaluation.models.items():
            lines.append(f"{name} ({own.model}): {self.said(own.scores.metrics)}{cut}")
            lines += self.tables(own.scores)
        return lines

    def evaluation_dict(self, evaluation: Evaluation) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        truncated = evaluation.encoded.report.truncated
        return {
            "task": self.name,
            "data": evaluation.source,
            "seq_len": evaluation.seq_len,
            "warning": evaluation.warning,
            "models": {
                name: {"model": own.model, "truncated": truncated, **own.scores.metrics, "report": own.scores.report}
                for name, own in evaluation.models.items()
            },
        }

    # ------------------------------------------------------------------------------------------ answers to prompts

    def prompted(self, examples: Sequence[Any]) -> list[Any]:
        """Those of `examples` whose prompts can be answered to the letter, for the exact match."""
        return []

    def exact_match(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        tick: Callable[[int], None] = lambda count: None,
        at_once: int = 1,
    ) -> float:
        """The share of the prompts of `examples`, which are `prompted`, that `model` answers to the letter."""
        raise NotImplementedError(f"{self.name} has no prompts")

    def prompt_lengths(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Any]) -> AnswerLengths:
        """What `exact_match` asks of `examples`, in lengths. Raises `UserError` where the chat template fails."""
        raise NotImplementedError(f"{self.name} has no prompts")

    def scored_answers(self, rows: Sequence[Any]) -> AnswerLengths | None:
        """The answers, in lengths, that `score` lets a model write to `rows`; None where it writes none."""
        return None

    def sampled(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> SampledPrompt | None:
        """The held-out prompt whose answer a run shows at each evaluation; None where there is none."""
        return None

    # ---------------------------------------------------------------------------------------- answers to examples

    def answers(self, model: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """For each example its answer, ready for JSON, in their order; only where the task `is_predicted`."""
        raise NotImplementedError(f"{self.name} is not predicted")

    def question(self, example: Any) -> dict[str, Any]:
        """What an answer repeats of its example."""
        return {}

    # -------------------------------------------------------------------------------------------------- the release

    def saved_settings(self, config: BaseConfig, architecture: PretrainedConfig) -> BaseConfig:
        """`config` with what the config.json of a model that was trained says of it."""
        return config

    def config_fields(self, config: BaseConfig, architecture: PretrainedConfig) -> dict[str, Any]:
        """What a release's config.json says beside what the base's said: the class, the labels, what is padding."""
        return {
            "architectures": [self.model.class_name(architecture)],
            "id2label": {str(number): label for number, label in architecture.id2label.items()},
            "label2id": dict(architecture.label2id),
            "problem_type": architecture.problem_type,
            "pad_token_id": architecture.pad_token_id,
        }

    def generation_fields(
        self, own: GenerationConfig, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any] | None:
        """What a release's generation_config.json says, of a base with `own`; None: what the base's says."""
        return None

    @abstractmethod
    def proof_row(self, row: Any) -> ProofRow:
        """What the live model and the release are asked of an encoded row."""

    def proof_rows(self, encoded: Any, budget: int) -> list[ProofRow]:
        """The same of an encoded set, of at most `budget` tokens in all."""
        return whole_within([self.proof_row(row) for row in encoded.rows], budget)

    @abstractmethod
    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """The same of `texts`, where no data can be read."""

    def proof_prompt(
        self, example: Any, rows: Sequence[ProofRow], tokenizer: PreTrainedTokenizerBase, most: int
    ) -> list[int]:
        """The tokens, at most `most`, of a prompt that both answer; empty where the task writes nothing.

        `example` is the first one of the data, None where there is none.
        """
        return []
