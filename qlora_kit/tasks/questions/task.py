"""Extractive question answering: a model learns to point at the part of a context that answers a question.

Shapes: B rows of a batch, T tokens; logits are (B, 2, T), those of the first and of the last token of the answer.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.proof import ProofRow, ProofTerms
from qlora_kit.tasks.questions import read
from qlora_kit.tasks.questions.metrics import squad_metrics
from qlora_kit.tasks.questions.read import AskedContext
from qlora_kit.tasks.questions.windows import NO_ANSWER, WindowRow, rows_of
from qlora_kit.tasks.rows import RowCollator, model_inputs
from qlora_kit.tasks.task import Asked, Batch, Collate, Lines, Source, Task
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 30  # of an answer that is given, as in BERT's evaluation


class SpanModel(TaskModel):
    """A model with a head that says where an answer begins and ends."""

    auto_class = "AutoModelForQuestionAnswering"
    mapping = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"
    endings = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    peft_type = "QUESTION_ANS"
    num_labels = 2
    over_tokens = True
    proof_outputs = ("start_logits", "end_logits")

    def logits(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """See `span_logits`."""
        return span_logits(outputs, attention_mask)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
    ) -> torch.Tensor:
        """See `span_loss`."""
        return span_loss(logits, labels, n_items)

    def label_shape(self, rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
        """Two places a row."""
        return (rows, 2)


def span_logits(outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of the first and of the last token of an answer, fp32 (B, 2, T); padding gets the lowest there is.

    So the loss and the answer of a row do not depend on the rows beside it (transformers' own loss is over padding
    too, and agrees where there is none).
    """
    import torch

    logits_B2T = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
    if attention_mask is None:
        return logits_B2T
    return logits_B2T.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(torch.float32).min)


def span_loss(logits_B2T: torch.Tensor, labels_B2: torch.Tensor, n_items: Any) -> torch.Tensor:
    """The summed cross-entropy of the first and of the last token over `n_items`, which counts both."""
    from torch.nn import functional

    loss: torch.Tensor = functional.cross_entropy(logits_B2T.flatten(0, 1), labels_B2.flatten(), reduction="sum")
    scaled: torch.Tensor = loss / n_items
    return scaled


@dataclass(frozen=True)
class WindowSet:
    """Encoded examples, each with all of its windows: a map-style data set of features for `RowCollator`."""

    rows: list[WindowRow]
    report: AuditReport  # on the examples

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> WindowRow:
        return self.rows[index]


class QuestionAnswering(Task):
    """The part of a context that answers a question, or that there is none."""

    name = "question-answering"
    model = SpanModel()
    metrics: ClassVar[Mapping[str, bool]] = {"f1": True, "exact_match": True, "loss": False}
    metric = "f1"
    row_unit = "rows"  # windows
    proof_terms = ProofTerms(
        unit="place",
        each="a place",
        answers="likeliest places",
        greedy="the list of likeliest places",
        same="the list of likeliest places is the same",
    )
    pair_advice = 'A question needs a newline behind it, as in training: `tokenizer(f"{question}\\n", context)`.'

    # ----------------------------------------------------------------------------------------------------- reading

    def fits(self, columns: Set[str]) -> bool:
        """Whether there are questions, contexts and answers, or SQuAD's paragraphs."""
        return read.fits(columns)

    def read(self, source: Source, config: BaseConfig) -> list[AskedContext]:
        """The questions with their answers. Raises `UserError`."""
        return read.read(source, config)

    def read_unanswered(self, source: Source) -> list[AskedContext]:
        """The questions; answers may be there."""
        return read.read_unlabelled(source)

    def resolve(self, config: BaseConfig, examples: Sequence[AskedContext], setting: str) -> BaseConfig:
        """`config` with the task. Raises `UserError` where no example has an answer."""
        if not any(example.answers for example in examples):
            rule = "has no answer in any example"
            raise UserError.of(setting, f"{len(examples)} examples", rule, "Give examples that have answers.")
        return replace(config, task=self.name)

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        config: RunConfig,
        examples: Sequence[AskedContext],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> WindowSet:
        """The windows of `examples` and where their answers are. Raises `UserError`, see `rows_of`."""
        return _encoded(examples, rows_of(examples, tokenizer, seq_len, labelled=True, setting=setting), seq_len)

    def encode_unanswered(
        self, examples: Sequence[AskedContext], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> WindowSet:
        """The windows of `examples`, and where answers are if there are any, to audit them. Raises `UserError`."""
        labelled = any(example.answers for example in examples)
        return _encoded(examples, rows_of(examples, tokenizer, seq_len, labelled), seq_len)

    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """See `RowCollator`."""
        return RowCollator.of(tokenizer)

    def audit(self, examples: Sequence[AskedContext], training: Sequence[AskedContext]) -> Lines:
        """How many questions have an answer, and those asked twice of one context with different answers."""
        return _audit(examples)

    def audit_rows(self, encoded: WindowSet) -> Lines:
        """How many windows examples have, and answers that are lost or too long to give."""
        return _audit_rows(encoded)

    def learned(self, example: AskedContext, row: WindowRow, show: Callable[[int], str]) -> str:
        """The part of the context that a row learns to point at, which may be more than the answer to whole tokens."""
        if row.label in (None, NO_ANSWER):
            return "«no answer»"
        start, end = row.characters(*row.label)
        return f"«{example.context[start:end]}»"

    # ----------------------------------------------------------------------------------------------------- scoring

    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """The mean loss over the windows, and SQuAD's figures over the examples."""
        losses: list[float] = []

        def noted(rows: Iterable[WindowRow]) -> Iterator[torch.Tensor]:
            for row, log_probs_2T in zip(rows, _row_log_probs(model, asked), strict=True):
                assert row.label is not None, "held-out examples have answers, or none"
                losses.append(-float(log_probs_2T[0, row.label[0]] + log_probs_2T[1, row.label[1]]) / 2)
                yield log_probs_2T

        with undisturbed(model):
            found = [answer.text for answer in found_answers(asked.rows, noted(asked.rows))]
        right = [[answer.text for answer in row.example.answers] for row in _first_rows(asked.rows)]
        loss = math.fsum(losses) / len(losses)
        return Scores({"loss": loss, **squad_metrics(found, right), "examples": len(right)})

    def said(self, metrics: Mapping[str, float]) -> str:
        """Loss, exact match and F1, those with and without an answer apart where there are both."""
        parts = []
        if "f1_answerable" in metrics and "exact_match_unanswerable" in metrics:
            parts = [
                f"answerable {metrics['exact_match_answerable']:.1%} and {metrics['f1_answerable']:.1%}",
                f"unanswerable {metrics['exact_match_unanswerable']:.1%}",
            ]
        return (
            f"held-out loss {metrics['loss']:.4f}, exact match {metrics['exact_match']:.1%}, F1 {metrics['f1']:.1%}"
            + (f" ({', '.join(parts)})" if parts else "")
        )

    def answers(self, model: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """The answer, "" where there is none, its score, and its first character and the one behind its last."""
        for found in found_answers(asked.rows, _row_log_probs(model, asked)):
            yield {"answer": found.text, "score": found.score, "start": found.start, "end": found.end}

    def question(self, example: AskedContext) -> dict[str, Any]:
        """The question, with its id where it has one."""
        own_id = {} if example.id is None else {"id": example.id}
        return {**own_id, "question": example.question}

    # ------------------------------------------------------------------------------------------------ the release

    def proof_row(self, row: WindowRow) -> ProofRow:
        """The first and the last token of the answer are right."""
        labels = [IGNORED, IGNORED] if row.label is None else list(row.label)
        return ProofRow(model_inputs(row), [IGNORED, *labels])

    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """A question on each text."""
        examples = [
            AskedContext(question="What is this about?", context=text, answers=(), id=None, origin="a built-in text")
            for text in texts
        ]
        return self.proof_rows(self.encode_unanswered(examples, tokenizer, seq_len, config), budget)


TASK = QuestionAnswering()


# ------------------------------------------------------------------------------------------------------- encoding


def _encoded(examples: Sequence[AskedContext], rows: list[WindowRow], seq_len: int) -> WindowSet:
    lengths = [row.full_tokens for row in _first_rows(rows)]
    report = audit_lengths(
        lengths,
        [False] * len(lengths),  # nothing is cut off: it goes on in the next window
        [1] * len(lengths),
        seq_len,
        empty=sum(not example.context.strip() for example in examples),
        duplicates=len(examples) - len({(example.question, example.context) for example in examples}),
    )
    return WindowSet(rows, report)


def _first_rows(rows: Iterable[WindowRow]) -> Iterator[WindowRow]:
    """The first window of each example."""
    return (next(own) for _, own in groupby(rows, key=lambda row: row.number))


# ------------------------------------------------------------------------------------------------------ answering


@dataclass(frozen=True, kw_only=True)
class FoundAnswer:
    """A part of a context and its probability, or that there is none: no text, and no place."""

    text: str
    score: float
    start: int | None
    end: int | None


def found_answers(rows: Sequence[WindowRow], log_probs: Iterable[torch.Tensor]) -> Iterator[FoundAnswer]:
    """The answer to each example, given for each row the log-probabilities (2, T) of its first and last token.

    The score of an answer is the probability of its first token times that of its last one, in the window where that
    is highest; that there is none has those of the row's first token, in the window where they are lowest.
    """
    pairs = zip(rows, log_probs, strict=True)
    for _, own in groupby(pairs, key=lambda pair: pair[0].number):
        best, none, where = -math.inf, math.inf, (0, 0)
        for row, log_probs_2T in own:
            none = min(none, float(log_probs_2T[:, 0].sum()))
            score, first, last = best_span(log_probs_2T, row.context_at, row.blanks())
            if score > best:
                best, where = score, row.characters(first, last)
        start, end = where
        if none >= best:
            yield FoundAnswer(text="", score=math.exp(none), start=None, end=None)
        else:
            text = row.example.context[start:end]
            yield FoundAnswer(text=text, score=math.exp(best), start=start, end=end)


def best_span(log_probs_2T: torch.Tensor, begin: int, blanks: Sequence[bool]) -> tuple[float, int, int]:
    """The highest sum of a start and an end among the tokens from `begin` on, and both places; −inf without any.

    The end is not before the start, at most `MAX_ANSWER_TOKENS` are from the one to the other, and at least one of
    them is none of the `blanks` (N,).
    """
    import torch

    tokens = len(blanks)
    if all(blanks):
        return -math.inf, begin, begin
    start_N, end_N = log_probs_2T[:, begin : begin + tokens]
    width = min(MAX_ANSWER_TOKENS, tokens)
    padded = torch.cat([end_N, end_N.new_full((width - 1,), -math.inf)])
    sums_NW = start_N[:, None] + padded.unfold(0, width, 1)
    has_text_NW = (
        torch.tensor([*map(operator.not_, blanks), *[False] * (width - 1)]).unfold(0, width, 1).cummax(1).values
    )
    sums_NW = sums_NW.masked_fill(~has_text_NW, -math.inf)
    place = int(sums_NW.argmax())
    first = begin + place // width
    return float(sums_NW.max()), first, first + place % width


def _log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Over the tokens of each row, without its padding: (B, 2, T), fp32 on the CPU."""
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    return span_logits(outputs, batch["attention_mask"]).cpu().log_softmax(2)


def _row_log_probs(model: Any, asked: Asked) -> Iterator[torch.Tensor]:
    """Those of each row (2, T), in their order."""
    for batch in asked.batches:
        yield from _log_probs(model, batch)


# ---------------------------------------------------------------------------------------------------------- audit


def _audit(examples: Sequence[AskedContext]) -> list[tuple[str, str]]:
    """How many questions have an answer, and questions asked twice of one context with different answers."""
    answerable = sum(bool(example.answers) for example in examples)
    by_question: dict[tuple[str, str], set[frozenset[str]]] = {}
    for example in examples:
        texts = frozenset(answer.text for answer in example.answers)
        by_question.setdefault((example.question, example.context), set()).add(texts)
    contexts = len({example.context for example in examples})
    return [
        ("with an answer", f"{answerable} ({answerable / len(examples):.1%})"),
        ("different contexts", str(contexts)),
        ("questions with different answers in different examples", str(sum(len(v) > 1 for v in by_question.values()))),
    ]


def _audit_rows(encoded: WindowSet) -> list[tuple[str, str]]:
    """How many windows examples have, answers that no window shows whole or no token holds, and those too long to give.

    Of several answers the first is meant, which is learned.
    """
    windows = Counter(row.number for row in encoded.rows)
    by_example = groupby(encoded.rows, key=lambda row: row.number)
    lost = too_long = 0
    for _, own in by_example:
        rows = list(own)
        lost += bool(rows[0].example.answers) and all(row.label == NO_ANSWER for row in rows)
        too_long += any(_answer_tokens(row) > MAX_ANSWER_TOKENS for row in rows)
    return [
        ("windows", str(len(encoded.rows))),
        ("windows to an example: mean / max", f"{len(encoded.rows) / len(windows):.2f} / {max(windows.values())}"),
        ("answers that no window shows whole", str(lost)),
        (f"answers longer than the {MAX_ANSWER_TOKENS} tokens that one may have", str(too_long)),
    ]


def _answer_tokens(row: WindowRow) -> int:
    """The tokens of the answer that a row learns."""
    return 0 if row.label in (None, NO_ANSWER) else row.label[1] - row.label[0] + 1
