"""Token classification: each word of a sentence gets a tag, such as those that spell out entities.

The first piece of a word is asked for its tag; the loss skips all others. In the shapes: B rows, T positions, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.labels import balanced_weights
from qlora_kit.tasks.losses import classification_loss
from qlora_kit.tasks.proof import ProofRow, chosen
from qlora_kit.tasks.report import table
from qlora_kit.tasks.rows import RowCollator, model_inputs
from qlora_kit.tasks.tagging import read, report
from qlora_kit.tasks.tagging.pieces import split
from qlora_kit.tasks.tagging.read import OUTSIDE, TaggedWords, check_tags, resolve_tags
from qlora_kit.tasks.task import Asked, Batch, Collate, Lines, Source, Task
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase


class TaggerModel(TaskModel):
    """A model with a head that reads a row of logits off each token."""

    auto_class = "AutoModelForTokenClassification"
    mapping = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"
    endings = ("ForTokenClassification",)
    peft_type = "TOKEN_CLS"

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
    ) -> torch.Tensor:
        """See `tagging_loss`."""
        return tagging_loss(logits, labels, n_items, weights_L)


def tagging_loss(
    logits_BTL: torch.Tensor, labels_BT: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy of the tokens with a label (−100: none) over `n_items`, in fp32.

    Each token's loss counts times the weight of its label.
    """
    return classification_loss(logits_BTL.flatten(0, 1), labels_BT.flatten(), n_items, weights_L)


@dataclass(frozen=True, kw_only=True)
class TaggedRow:
    """The tokens of a sentence; `labels` has the number of a tag at the first piece of each word, −100 elsewhere."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    labels: list[int] | None  # None where they are to be found
    firsts: list[int | None]  # where the first piece of each word is; None where the model does not see the word
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    origin: str
    full_tokens: int
    lost: int  # words that were cut off

    @property
    def label(self) -> None:
        """Nothing: the row as a whole has none."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut."""
        return self.full_tokens > len(self.input_ids)


@dataclass(frozen=True)
class TaggedSet:
    """Encoded sentences: a map-style data set of features for the collator."""

    rows: list[TaggedRow]
    report: AuditReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TaggedRow:
        return self.rows[index]


class TokenClassification(Task):
    """Each word of a sentence gets a tag."""

    name = "token-classification"
    model = TaggerModel()
    metrics: ClassVar[Mapping[str, bool]] = {
        "f1": True,
        "precision": True,
        "recall": True,
        "accuracy": True,
        "loss": False,
    }
    metric = "f1"
    settings = frozenset({"class_weights", "labels", "multi_label"})
    has_pipeline = True
    proof_terms = chosen("token", "a token", "tags")

    # ----------------------------------------------------------------------------------------------------- reading

    def fits(self, columns: Set[str]) -> bool:
        """Whether there are words and tags."""
        return read.fits(columns)

    def read(self, source: Source, config: BaseConfig) -> list[TaggedWords]:
        """The sentences with their tags. Raises `UserError`."""
        return read.read(source, config)

    def read_unanswered(self, source: Source) -> list[TaggedWords]:
        """The sentences, or texts split at white space; tags may be there."""
        return read.read_untagged(source)

    def resolve(self, config: BaseConfig, examples: Sequence[TaggedWords], setting: str) -> BaseConfig:
        """`config` with the tags as labels. Raises `UserError`."""
        return resolve_tags(config, examples, setting, self.name)

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        config: RunConfig,
        examples: Sequence[TaggedWords],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> TaggedSet:
        """The tokens and tags of `examples`, cut at `seq_len`; those without a word that a model sees are left out.

        Raises `UserError` for tags that are not among the labels of `config`, with the places.
        """
        encoded = self.encode_held_out(config, examples, tokenizer, seq_len, setting)
        return TaggedSet([row for row in encoded.rows if _supervised(row)], encoded.report)

    def encode_held_out(
        self,
        config: RunConfig,
        examples: Sequence[TaggedWords],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> TaggedSet:
        """The same with every sentence: to score, words that a model does not see count too. Raises alike."""
        check_tags(config.base, examples, setting)
        encoded = _encoded(examples, config.base.labels or (), tokenizer, seq_len, setting)
        if not any(_supervised(row) for row in encoded.rows):
            rule = f"has no word within {seq_len} tokens that the tokenizer makes anything of"
            raise UserError.of(setting, f"{len(examples)} sentences", rule, "Give sentences with words.")
        return encoded

    def encode_unanswered(
        self, examples: Sequence[TaggedWords], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> TaggedSet:
        """The tokens of `examples`, cut at `seq_len`; tags that they have stay apart."""
        return _encoded(examples, None, tokenizer, seq_len, "data")

    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """See `TagCollator`."""
        return TagCollator(RowCollator.of(tokenizer))

    def label_weights(self, rows: TaggedSet, config: BaseConfig) -> torch.Tensor:
        """The balanced weights (L,) of the tags of the training `rows`."""
        import torch

        assert config.labels is not None, "resolved with the data"
        counts = Counter(label for row in rows.rows for label in row.labels or () if label != IGNORED)
        by_number = [counts[number] for number in range(len(config.labels))]
        return torch.tensor(balanced_weights(by_number, sum(by_number), several=False))

    def audit(self, examples: Sequence[TaggedWords], training: Sequence[TaggedWords]) -> Lines:
        """How many entities of each type there are, words outside any, and tags that training never shows."""
        return _audit(examples, training)

    def audit_rows(self, encoded: TaggedSet) -> Lines:
        """What the model does not see: words that were cut off, with how many entities, and words without a token."""
        lost = sum(row.lost for row in encoded.rows)
        words = sum(len(row.words) for row in encoded.rows)
        seen = sum(_supervised(row) for row in encoded.rows)
        return [
            ("words cut off", f"{lost} of {words}"),
            ("words that give no token", str(words - seen - lost)),
            ("entities cut off or cut short", str(sum(_cut_entities(row) for row in encoded.rows))),
        ]

    def learned(self, example: TaggedWords, row: TaggedRow, show: Callable[[int], str]) -> str:
        """The words that a model sees, each with its tag."""
        found = zip(example.words, example.tags or (), row.firsts, strict=False)
        return f"«{' '.join(f'{word}/{tag}' for word, tag, first in found if first is not None)}»"

    # ----------------------------------------------------------------------------------------------------- scoring

    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """The mean loss over the words that the model sees, and the figures of the entities of all words.

        A word that it does not see counts as one outside any entity.
        """
        import torch

        names = config.labels or ()
        loss, answers = 0.0, []
        with undisturbed(model):
            for logits_TL, row in _logits(model, asked):
                own = logits_TL[: len(row.input_ids)]
                loss += float(tagging_loss(own[None], torch.tensor([row.labels]), 1, None))
                answers.append([OUTSIDE if place is None else names[int(own[place].argmax())] for place in row.firsts])
        truth = [list(row.tags) for row in asked.rows]
        seen, words = sum(_supervised(row) for row in asked.rows), sum(map(len, truth))
        metrics = {"loss": loss / seen, **report.tag_metrics(truth, answers), "examples": len(truth)}
        lost = sum(row.lost for row in asked.rows)
        counts = {"words": words, "words_cut_off": lost, "words_without_pieces": words - seen - lost}
        return Scores(metrics, {"labels": list(names), **counts, "report": report.tag_report(truth, answers)})

    def said(self, metrics: Mapping[str, float]) -> str:
        """Loss, the entities' F1 with precision and recall, and the accuracy by word."""
        return report.said(metrics)

    def tables(self, scores: Scores) -> list[Table]:
        """The report type by type."""
        return [table(scores.report["report"], "entities")]

    def answers(self, model: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """The tag of each word and its score, None for words that the model does not see; and the entities."""
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        for logits_TL, row in _logits(model, asked):
            best_T, numbers_T = (found.tolist() for found in logits_TL.softmax(1).max(1))
            tags = [None if place is None else names[numbers_T[place]] for place in row.firsts]
            scores = [None if place is None else best_T[place] for place in row.firsts]
            yield {"tags": tags, "scores": scores, "entities": _entities(row.words, tags, scores)}

    def question(self, example: TaggedWords) -> dict[str, Any]:
        """The words."""
        return {"tokens": list(example.words)}

    # ------------------------------------------------------------------------------------------------ the release

    def proof_row(self, row: TaggedRow) -> ProofRow:
        """The number of the tag at each word's first piece is right."""
        labels = [IGNORED] * len(row.input_ids) if row.labels is None else row.labels
        return ProofRow(model_inputs(row), [IGNORED, *labels])

    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """Each text as its words."""
        examples = [TaggedWords(tuple(text.split()), None, "a built-in text") for text in texts]
        return self.proof_rows(self.encode_unanswered(examples, tokenizer, seq_len, config), budget)


TASK = TokenClassification()


# ------------------------------------------------------------------------------------------------------- encoding


def _encoded(
    examples: Sequence[TaggedWords],
    labels: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    setting: str,
) -> TaggedSet:
    if not examples:
        raise UserError.of(setting, "", "holds no examples", "Give data with at least one example.")
    numbers = None if labels is None else {label: number for number, label in enumerate(labels)}
    rows = [_row(example, numbers, tokenizer, seq_len) for example in examples]
    report = audit_lengths(
        [row.full_tokens for row in rows],
        [row.truncated for row in rows],
        [_supervised(row) for row in rows],
        seq_len,
        empty=sum(not example.words for example in examples),
        duplicates=len(examples) - len({example.words for example in examples}),
    )
    return TaggedSet(rows, report)


def _row(
    example: TaggedWords, numbers: dict[str, int] | None, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> TaggedRow:
    pieces = split(example.words, tokenizer, seq_len)
    labels = None
    if numbers is not None and example.tags is not None:
        labels = [IGNORED] * len(pieces.input_ids)
        for place, tag in zip(pieces.firsts, example.tags, strict=True):
            if place is not None:
                labels[place] = numbers[tag]
    return TaggedRow(
        input_ids=pieces.input_ids,
        token_type_ids=pieces.token_type_ids,
        labels=labels,
        firsts=pieces.firsts,
        words=example.words,
        tags=example.tags,
        origin=example.origin,
        full_tokens=pieces.full_tokens,
        lost=pieces.lost,
    )


def _supervised(row: TaggedRow) -> int:
    """The words that the model sees."""
    return sum(place is not None for place in row.firsts)


class TagCollator:
    """Pads rows on the right to a common length, and masks the padding.

    Called with rows it returns what `RowCollator` does and, where the rows have tags, `labels`: int64 (B, T), −100
    where a token is no word's first.
    """

    def __init__(self, padded: RowCollator) -> None:
        self._padded = padded

    def __call__(self, rows: Sequence[TaggedRow]) -> Batch:
        """The batch of `rows`."""
        import torch

        batch = self._padded(rows)
        length = batch["input_ids"].shape[1]
        labels = [[*row.labels, *[IGNORED] * (length - len(row.labels))] for row in rows if row.labels is not None]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch


# ------------------------------------------------------------------------------------------- scores and answers


def _logits(model: Any, asked: Asked) -> Iterator[tuple[torch.Tensor, TaggedRow]]:
    """The logits (T, L) of each row, fp32 on the CPU."""
    rows = iter(asked.rows)
    for batch in asked.batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        yield from zip(model(**inputs).logits.float().cpu(), rows, strict=False)


def _entities(words: Sequence[str], tags: Sequence[str | None], scores: Sequence[float | None]) -> list[dict[str, Any]]:
    """The entities that `tags` spell out: words from `start` to before `end`, their score the mean of the words'."""
    found = []
    for entity in report.entities([OUTSIDE if tag is None else tag for tag in tags]):
        own = [score for score in scores[entity.start : entity.end] if score is not None]
        found.append(
            {
                "type": entity.kind,
                "text": " ".join(words[entity.start : entity.end]),
                "start": entity.start,
                "end": entity.end,
                "score": sum(own) / len(own),
            }
        )
    return found


# ---------------------------------------------------------------------------------------------------------- audit


def _audit(examples: Sequence[TaggedWords], training: Sequence[TaggedWords]) -> list[tuple[str, str]]:
    """How many entities of each type there are, words outside any, and tags that the training sentences never have."""
    tags = Counter(tag for example in examples for tag in example.tags or ())
    kinds = Counter(found.kind for example in examples for found in report.entities(example.tags or ()))
    words = sum(tags.values())
    lines = [(f"entities {kind}", f"{count} ({count / kinds.total():.1%})") for kind, count in kinds.most_common()]
    lines.append(("words outside entities", f"{tags[OUTSIDE]} of {words} ({tags[OUTSIDE] / max(words, 1):.1%})"))
    bare = sum(all(tag == OUTSIDE for tag in example.tags or ()) for example in examples)
    lines.append(("sentences without entities", str(bare)))
    if examples is not training:
        known = {tag for example in training for tag in example.tags or ()}
        unseen = ", ".join(f"{tag} ({count})" for tag, count in tags.items() if tag not in known)
        lines.append(("tags that training never shows", unseen or "none"))
    by_words: dict[tuple[str, ...], set[tuple[str, ...] | None]] = {}
    for example in examples:
        by_words.setdefault(example.words, set()).add(example.tags)
    differing = sum(len(found) > 1 for found in by_words.values())
    return [*lines, ("sentences with different tags in different examples", str(differing))]


def _cut_entities(row: TaggedRow) -> int:
    """The entities that have a word which was cut off."""
    if not row.lost:
        return 0
    return sum(
        any(row.firsts[word] is None for word in range(found.start, found.end))
        for found in report.entities(row.tags or ())
    )
