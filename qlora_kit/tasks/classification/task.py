"""Text classification: a text, or a pair of them, gets a label, or several.

In the shapes: B rows, T positions, L labels. Padding is on the right, for models that read both ways and for those that
read the label off the last token alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.model.task_models import CLASSIFICATION, classification_loss
from qlora_kit.tasks.classification import read
from qlora_kit.tasks.classification.labels import balanced_weights, check_labels, resolve_labels
from qlora_kit.tasks.classification.read import LabelledText
from qlora_kit.tasks.classification.report import class_metrics, class_report, said, tables, write_report
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.task import Answering, Asked, Batch, Judge, Proving, Reader, Scores, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

JOINT = "\n"  # between a pair, for a tokenizer that puts nothing there


@dataclass(frozen=True)
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


def _resolve(config: BaseConfig, examples: Sequence[LabelledText], setting: str) -> BaseConfig:
    return replace(resolve_labels(config, examples, setting), task=CLASSIFICATION)


# ------------------------------------------------------------------------------------------------------- encoding


def encode(
    config: RunConfig, examples: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, seq_len: int, setting: str
) -> LabelledSet:
    """The tokens and label numbers of `examples`, cut at `seq_len`.

    Raises `UserError` for labels that are not among those of `config`, with the places.
    """
    check_labels(config.base, examples, setting)
    numbers = {label: number for number, label in enumerate(config.base.labels or ())}
    several = bool(config.base.multi_label)
    labels = [_number(example.labels, numbers, several) for example in examples]
    return _encoded(examples, labels, tokenizer, seq_len)


def encode_unlabelled(
    examples: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
) -> LabelledSet:
    """The tokens of `examples`, cut at `seq_len`."""
    return _encoded(examples, [None] * len(examples), tokenizer, seq_len)


def _number(names: Sequence[str], numbers: Mapping[str, int], several: bool) -> int | list[int]:
    if not several:
        return numbers[names[0]]
    return [int(label in names) for label in numbers]


def _encoded(
    examples: Sequence[LabelledText],
    labels: Sequence[int | list[int] | None],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> LabelledSet:
    if not examples:
        raise UserError.of("--data", "", "holds no examples", "Give data with at least one example.")
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


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts anything between the two texts of a pair; those of most decoders do not."""
    both = tokenizer("a", "a", verbose=False)["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = [i for i in range(len(both)) if both[i : i + len(bare)] == bare]
    return len(starts) < 2 or starts[1] > starts[0] + len(bare)


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
    ids: list[int] = encoded["input_ids"]
    if not ids:  # an empty text, and a tokenizer that adds nothing: the model must still see something
        ids = [tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
    return LabelledRow(ids, encoded.get("token_type_ids"), label, full_tokens > seq_len, example.origin, full_tokens)


class Row(Protocol):
    """What `RowCollator` asks of a row."""

    @property
    def input_ids(self) -> list[int]:
        """Its tokens."""

    @property
    def token_type_ids(self) -> list[int] | None:
        """First or second text, for models that ask."""

    @property
    def label(self) -> int | list[int] | tuple[int, ...] | None:
        """A number or several, 0 or 1 for each label, or None where it is to be found."""


class RowCollator:
    """Pads rows on the right to a common length, and masks the padding.

    Called with rows it returns `input_ids`, `attention_mask` (0 in the padding), `token_type_ids` where the tokenizer
    gives them, each int64 (B, T), and `labels` where the rows have some: int64 (B,), for tuples of numbers int64
    (B, 2), or with several to a row float32 (B, L). T is the longest row and no multiple of anything: short rows would
    be a good part padding, and no gain of it has been measured (docs/log.md).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad_token_id, self._pad_type_id = tokenizer.pad_token_id, tokenizer.pad_token_type_id

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of `rows`."""
        import torch

        length = max(len(row.input_ids) for row in rows)

        def padded(lists: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*own, *[value] * (length - len(own))] for own in lists], dtype=torch.int64)

        batch = {
            "input_ids": padded((row.input_ids for row in rows), self._pad_token_id),
            "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
        }
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if types:
            batch["token_type_ids"] = padded(types, self._pad_type_id)
        if rows[0].label is not None:
            dtype = torch.float32 if isinstance(rows[0].label, list) else torch.int64
            batch["labels"] = torch.tensor([row.label for row in rows], dtype=dtype)
        return batch


def _collator(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
) -> Callable[[Sequence[LabelledRow]], Batch]:
    return RowCollator(tokenizer)


def _weights(rows: LabelledSet, config: BaseConfig) -> torch.Tensor:
    """The balanced weights (L,) of the labels of the training `rows`."""
    import torch

    assert config.labels is not None, "resolved with the data"
    counts = [0] * len(config.labels)
    for row in rows.rows:
        assert row.label is not None, "training examples have labels"
        for number in _numbers(row.label):
            counts[number] += 1
    return torch.tensor(balanced_weights(counts, len(rows), bool(config.multi_label)))


def _numbers(label: int | list[int]) -> list[int]:
    """The numbers of the labels that an example has."""
    return [number for number, has in enumerate(label) if has] if isinstance(label, list) else [label]


# -------------------------------------------------------------------------------------------------------- scoring


def _score(model: Any, asked: Asked, config: BaseConfig) -> Scores:
    """The mean loss (every example counts the same, whatever its batch and class) and the figures of the classes."""
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
    metrics = class_metrics(labels.long().numpy(), answers.numpy())
    report = class_report(labels.long().numpy(), answers.numpy(), config.labels or ())
    return Scores({"loss": loss, **metrics, "examples": len(labels)}, report)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """The logits (B, L) of a batch, fp32 on the CPU."""
    found: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return found.float().cpu()


# ------------------------------------------------------------------------------------------------------ answering


def _answer(model: Any, asked: Asked, config: BaseConfig) -> Iterator[dict[str, Any]]:
    """For each row its label and the score of it, or of several all whose score is above a half; and every score."""
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    several = model.config.problem_type == "multi_label_classification"
    for batch in asked.batches:
        logits_BL = _logits(model, batch)
        scores_BL = logits_BL.sigmoid() if several else logits_BL.softmax(1)
        for scores in scores_BL.tolist():
            yield _said_of(dict(zip(names, scores, strict=True)), several)


def _said_of(scores: dict[str, float], several: bool) -> dict[str, Any]:
    if several:
        return {"labels": [name for name, score in scores.items() if score > 0.5], "scores": scores}
    best = max(scores, key=lambda name: scores[name])
    return {"label": best, "score": scores[best], "scores": scores}


def _question(example: LabelledText) -> dict[str, Any]:
    pair = {} if example.pair is None else {"text_pair": example.pair}
    return {"text": example.text, **pair}


# -------------------------------------------------------------------------------------------------------- proving


def _inputs(row: LabelledRow) -> dict[str, list[int]]:
    types = {} if row.token_type_ids is None else {"token_type_ids": row.token_type_ids}
    return {"input_ids": row.input_ids, **types}


def _right(row: LabelledRow) -> list[int]:
    """The number of the label; of several no single one is right."""
    return [row.label if isinstance(row.label, int) else IGNORED]


def _built_in(texts: Sequence[str]) -> list[LabelledText]:
    return [LabelledText(text, None, (), False, "a built-in text") for text in texts]


# -------------------------------------------------------------------------------------------------------- audit


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


TASK = Task(
    CLASSIFICATION,
    Reader(read.fits, read.read, _resolve, encode, _audit, lambda e, row: ", ".join(e.labels)),
    Judge(
        _score,
        {"f1": True, "accuracy": True, "f1_weighted": True, "loss": False},
        "f1",
        said,
        write_report,
        tables,
    ),
    _collator,
    Answering(read.read_unlabelled, encode_unlabelled, _answer, _question),
    Proving(_inputs, _right, _built_in),
    _weights,
)
