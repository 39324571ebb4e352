"""Text classification: a text, or a pair of them, gets a label, or several.

In the shapes: B rows, T positions, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.tasks.classification import read, report
from qlora_kit.tasks.classification.labels import check_labels, resolve_labels
from qlora_kit.tasks.classification.read import LabelledText
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.labels import balanced_weights
from qlora_kit.tasks.losses import classification_loss
from qlora_kit.tasks.proof import ProofRow, chosen
from qlora_kit.tasks.rows import JOINT, RowCollator, model_inputs, not_empty, separates_pairs
from qlora_kit.tasks.task import Asked, Batch, Collate, Lines, Source, Task
from qlora_kit.tasks.task_model import TaskModel, reads_both_ways

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class ClassifierModel(TaskModel):
    """A model with a head that reads one row of logits off a text."""

    auto_class = "AutoModelForSequenceClassification"
    mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    endings = ("ForSequenceClassification",)
    peft_type = "SEQ_CLS"

    def is_usual_for(self, architecture: PretrainedConfig) -> bool:
        """Encoders are for it."""
        return reads_both_ways(architecture)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
    ) -> torch.Tensor:
        """The cross-entropy of each example: over the classes, or of each label where there may be several."""
        return classification_loss(logits, labels, n_items, weights_L)

    def label_shape(self, rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
        """A number a row, or with several to an example 0 or 1 for each label."""
        return (rows, labels) if several else (rows,)


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """The tokens of an example; `label` is a number, 0 or 1 for each label, or None where it is to be found."""

    input_ids: list[int]
    token_type_ids: list[int] | None  # of the tokens: first or second text, for models that ask
    label: int | list[int] | None
    truncated: bool
    origin: str
    full_tokens: int


@dataclass(frozen=True)
class LabelledSet:
    """Encoded examples: a map-style data set of features for `RowCollator`."""

    rows: list[LabelledRow]
    report: AuditReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LabelledRow:
        return self.rows[index]


class TextClassification(Task):
    """A text, or a pair of texts, gets a label, or several."""

    name = "text-classification"
    model = ClassifierModel()
    metrics: ClassVar[Mapping[str, bool]] = {"f1": True, "accuracy": True, "f1_weighted": True, "loss": False}
    metric = "f1"
    settings = frozenset({"class_weights", "labels", "multi_label"})
    has_pipeline = True
    proof_terms = chosen("example", "an example", "labels")
    pair_advice = 'Of a pair the two texts need a newline between them, as in training: `classify(f"{text}\\n{pair}")`.'

    # ----------------------------------------------------------------------------------------------------- reading

    def fits(self, columns: Set[str]) -> bool:
        """Whether there is a text or a pair, and a label."""
        return read.fits(columns)

    def read(self, source: Source, config: BaseConfig) -> list[LabelledText]:
        """The texts with their labels. Raises `UserError`."""
        return read.read(source, config)

    def read_unanswered(self, source: Source) -> list[LabelledText]:
        """The texts; a column of labels may be there."""
        return read.read_unlabelled(source)

    def resolve(self, config: BaseConfig, examples: Sequence[LabelledText], setting: str) -> BaseConfig:
        """`config` with the labels, and whether an example may have several. Raises `UserError`."""
        return replace(resolve_labels(config, examples, setting), task=self.name)

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        config: RunConfig,
        examples: Sequence[LabelledText],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> LabelledSet:
        """The tokens and label numbers of `examples`, cut at `seq_len`.

        Raises `UserError` for labels that are not among those of `config`, with the places.
        """
        check_labels(config.base, examples, setting)
        numbers = {label: number for number, label in enumerate(config.base.labels or ())}
        several = bool(config.base.multi_label)
        labels = [_number(example.labels, numbers, several) for example in examples]
        return _encoded(examples, labels, tokenizer, seq_len)

    def encode_unanswered(
        self, examples: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> LabelledSet:
        """The tokens of `examples`, cut at `seq_len`."""
        return _encoded(examples, [None] * len(examples), tokenizer, seq_len)

    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """See `RowCollator`."""
        return RowCollator.of(tokenizer)

    def label_weights(self, rows: LabelledSet, config: BaseConfig) -> torch.Tensor:
        """The balanced weights (L,) of the labels of the training `rows`."""
        import torch

        assert config.labels is not None, "resolved with the data"
        counts = [0] * len(config.labels)
        for row in rows.rows:
            assert row.label is not None, "training examples have labels"
            for number in _numbers(row.label):
                counts[number] += 1
        return torch.tensor(balanced_weights(counts, len(rows), bool(config.multi_label)))

    def audit(self, examples: Sequence[LabelledText], training: Sequence[LabelledText]) -> Lines:
        """How many examples each label has, and labels that the training examples never have."""
        return _audit(examples, training)

    def learned(self, example: LabelledText, row: LabelledRow, show: Callable[[int], str]) -> str:
        """The names of the labels."""
        return f"«{', '.join(example.labels)}»"

    # ----------------------------------------------------------------------------------------------------- scoring

    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """The mean loss (each example counts the same, whatever its batch and class) and the figures of the classes."""
        import torch

        all_logits, all_labels = [], []
        with undisturbed(model):
            for batch in asked.batches:
                all_logits.append(_logits(model, batch))
                all_labels.append(batch["labels"].cpu())
        logits_BL, labels = torch.cat(all_logits), torch.cat(all_labels)
        loss = float(classification_loss(logits_BL, labels, labels.numel(), None))
        several = labels.dim() == 2
        answers = (logits_BL > 0).long() if several else logits_BL.argmax(1)
        pair = labels.long().numpy(), answers.numpy()
        metrics = {"loss": loss, **report.class_metrics(*pair), "examples": len(labels)}
        return Scores(metrics, report.class_report(*pair, config.labels or ()))

    def said(self, metrics: Mapping[str, float]) -> str:
        """Loss, accuracy and F1."""
        return report.said(metrics)

    def write_report(self, scores: Scores, folder: Path) -> None:
        """Write the report and the picture of the confusion matrix."""
        report.write_report(scores, folder)

    def tables(self, scores: Scores) -> list[Table]:
        """The report class by class."""
        return report.tables(scores)

    def answers(self, model: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """The label and its score, or of several all whose score is above a half; and every score."""
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        several = model.config.problem_type == "multi_label_classification"
        for batch in asked.batches:
            logits_BL = _logits(model, batch)
            scores_BL = logits_BL.sigmoid() if several else logits_BL.softmax(1)
            for scores in scores_BL.tolist():
                yield _answer(dict(zip(names, scores, strict=True)), several)

    def question(self, example: LabelledText) -> dict[str, Any]:
        """The text, or both of a pair."""
        pair = {} if example.pair is None else {"text_pair": example.pair}
        return {"text": example.text, **pair}

    # ------------------------------------------------------------------------------------------------ the release

    def proof_row(self, row: LabelledRow) -> ProofRow:
        """The number of the label is right; of several no single one is."""
        return ProofRow(model_inputs(row), [IGNORED, row.label if isinstance(row.label, int) else IGNORED])

    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """Each text alone."""
        examples = [
            LabelledText(text=text, pair=None, labels=(), listed=False, origin="a built-in text") for text in texts
        ]
        return self.proof_rows(self.encode_unanswered(examples, tokenizer, seq_len, config), budget)


TASK = TextClassification()


# ------------------------------------------------------------------------------------------------------- encoding


def _number(names: Sequence[str], numbers: Mapping[str, int], several: bool) -> int | list[int]:
    if not several:
        return numbers[names[0]]
    return [int(label in names) for label in numbers]


def _numbers(label: int | list[int]) -> list[int]:
    """The numbers of the labels that an example has."""
    return [number for number, has in enumerate(label) if has] if isinstance(label, list) else [label]


def _encoded(
    examples: Sequence[LabelledText],
    labels: Sequence[int | list[int] | None],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> LabelledSet:
    if not examples:
        raise UserError.of("data", "", "holds no examples", "Give data with at least one example.")
    separates = separates_pairs(tokenizer)
    rows = [_row(e, label, tokenizer, seq_len, separates) for e, label in zip(examples, labels, strict=True)]
    report = audit_lengths(
        [row.full_tokens for row in rows],
        [row.truncated for row in rows],
        [1] * len(rows),
        seq_len,
        empty=sum(not example.text.strip() for example in examples),
        duplicates=len(examples) - len({(example.text, example.pair) for example in examples}),
    )
    return LabelledSet(rows, report)


def _row(
    example: LabelledText,
    label: int | list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    separates: bool,
) -> LabelledRow:
    text, pair = example.text, example.pair
    if pair is not None and not separates:
        text, pair = f"{text}{JOINT}{pair}", None
    encoded = tokenizer(text, pair, verbose=False)
    full_tokens = len(encoded["input_ids"])
    if full_tokens > seq_len:
        encoded = tokenizer(text, pair, truncation=True, max_length=seq_len, verbose=False)
    return LabelledRow(
        input_ids=not_empty(encoded["input_ids"], tokenizer),
        token_type_ids=encoded.get("token_type_ids"),
        label=label,
        truncated=full_tokens > seq_len,
        origin=example.origin,
        full_tokens=full_tokens,
    )


# ------------------------------------------------------------------------------------------- scores and answers


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """The logits (B, L) of a batch, fp32 on the CPU."""
    found: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return found.float().cpu()


def _answer(scores: dict[str, float], several: bool) -> dict[str, Any]:
    if several:
        return {"labels": [name for name, score in scores.items() if score > 0.5], "scores": scores}
    best = max(scores, key=lambda name: scores[name])
    return {"label": best, "score": scores[best], "scores": scores}


# ---------------------------------------------------------------------------------------------------------- audit


def _audit(examples: Sequence[LabelledText], training: Sequence[LabelledText]) -> list[tuple[str, str]]:
    """How many examples each label has, and labels that the training examples never have."""
    counts = Counter(label for example in examples for label in example.labels)
    lines = [(f"label {name}", f"{count} ({count / len(examples):.1%})") for name, count in counts.most_common()]
    if any(example.listed for example in examples):
        lines.append(("without any label", str(sum(not example.labels for example in examples))))
    known = {label for example in training for label in example.labels}
    unseen = {name: count for name, count in counts.items() if name not in known}
    if examples is not training:
        found = ", ".join(f"{name} ({count})" for name, count in unseen.items())
        lines.append(("labels that training never shows", found or "none"))
    by_text: dict[tuple[str, str | None], set[tuple[str, ...]]] = {}
    for example in examples:
        by_text.setdefault((example.text, example.pair), set()).add(tuple(sorted(example.labels)))
    lines.append(("texts with different labels in different examples", str(sum(len(v) > 1 for v in by_text.values()))))
    return lines
