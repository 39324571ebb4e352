"""Text to text: an encoder reads a source, and a decoder says the target. Translation, summaries, short answers.

In the shapes: B rows, S positions of the source, T of the target, V tokens of the vocabulary. Padding is on the right
of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.model.task_models import TEXT2TEXT, sequence_loss
from qlora_kit.system.files import write_json
from qlora_kit.tasks.decoding import Answers, end_ids, undisturbed
from qlora_kit.tasks.task import Answering, Asked, Batch, Judge, Proving, Reader, Scores, Task
from qlora_kit.tasks.text2text import read
from qlora_kit.tasks.text2text.metrics import text_metrics
from qlora_kit.tasks.text2text.read import SourceTarget

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PAD_MULTIPLE = 8
MORE_TOKENS = 8  # that an answer may have beyond the longest one expected, so that one that goes on is seen to
REPORT_FILE = "evaluation.json"
GREEDY = {"do_sample": False, "num_beams": 1}
# of the generation settings that a model came with only these stay: what may begin or end an answer, or not be in it
KEPT = (
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@dataclass(frozen=True)
class PairRow:
    """The tokens of an example; `labels` are those of its target with the end of text, None where it is asked.

    `max_tokens` is the most that an answer may have. The numbers of tokens in full are those before any is cut off.
    """

    input_ids: list[int]
    labels: list[int] | None
    max_tokens: int
    origin: str
    full_tokens: int  # of the source
    full_target_tokens: int
    target: str | None  # as it stands in the data: answers are scored against it

    @property
    def truncated(self) -> bool:
        """Whether the source was cut."""
        return self.full_tokens > self.max_tokens

    @property
    def target_truncated(self) -> bool:
        """Whether the target was cut."""
        return self.full_target_tokens > self.max_tokens


@dataclass(frozen=True)
class PairSet:
    """Encoded examples: a map-style data set of features for `PairCollator`. The report's lengths are of the longer."""

    rows: list[PairRow]
    report: AuditReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairRow:
        return self.rows[index]

    @property
    def length_lines(self) -> list[tuple[str, str]]:
        """How long sources and targets are, and how many of each are cut, for the audit."""
        most = self.rows[0].max_tokens
        sources = length_line([row.full_tokens for row in self.rows])
        targets = length_line([row.full_target_tokens for row in self.rows])
        return [
            ("tokens of a source: min / median / p95 / max", sources),
            ("tokens of a target: min / median / p95 / max", targets),
            (f"sources truncated to {most} tokens", str(sum(row.truncated for row in self.rows))),
            (f"targets truncated to {most} tokens", str(sum(row.target_truncated for row in self.rows))),
        ]


def length_line(lengths: Sequence[int]) -> str:
    """The least, the median, the 95th percentile and the most of some lengths."""
    report = audit_lengths(lengths, [], [], max(lengths), empty=0, duplicates=0)
    found = (report.length_min, report.length_median, report.length_p95, report.length_max)
    return " / ".join(f"{length:g}" for length in found)


def _resolve(config: BaseConfig, examples: Sequence[SourceTarget], setting: str) -> BaseConfig:
    return replace(config, task=TEXT2TEXT)


# ------------------------------------------------------------------------------------------------------- encoding


def encode(
    config: RunConfig, examples: Sequence[SourceTarget], tokenizer: PreTrainedTokenizerBase, seq_len: int, setting: str
) -> PairSet:
    """The tokens of `examples`, sources behind the prefix of `config`; source and target are each cut at `seq_len`.

    Raises `UserError` where there is no example, or no token that ends a target.
    """
    return _encoded(examples, tokenizer, seq_len, config.base, setting)


def encode_unanswered(
    examples: Sequence[SourceTarget], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
) -> PairSet:
    """The same of sources whose targets may not be known."""
    return _encoded(examples, tokenizer, seq_len, config, "--data")


def _encoded(
    examples: Sequence[SourceTarget],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    config: BaseConfig,
    setting: str,
) -> PairSet:
    if not examples:
        raise UserError.of(setting, "", "holds no examples", "Give data with at least one example.")
    if tokenizer.eos_token_id is None:
        rule = "has no end-of-text token, so the model cannot learn to stop"
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise UserError.of("--tokenizer", name, rule, "Set eos_token in its tokenizer_config.json.")
    rows = [_row(example, tokenizer, seq_len, config.source_prefix or "") for example in examples]
    report = audit_lengths(
        [max(row.full_tokens, row.full_target_tokens) for row in rows],
        [row.truncated or row.target_truncated for row in rows],
        [len(row.labels or [0]) for row in rows],
        seq_len,
        empty=sum(not example.source.strip() for example in examples),
        duplicates=len(examples) - len({(example.source, example.target) for example in examples}),
    )
    return PairSet(rows, report)


def _row(example: SourceTarget, tokenizer: PreTrainedTokenizerBase, seq_len: int, prefix: str) -> PairRow:
    text = prefix + example.source
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    full_tokens = len(ids)
    if full_tokens > seq_len:
        ids = tokenizer(text, truncation=True, max_length=seq_len, verbose=False)["input_ids"]
    if not ids:  # an empty text, and a tokenizer that adds nothing: the model must still see something
        ids = [tokenizer.eos_token_id]
    labels, full_target_tokens = None, 0
    if example.target is not None:
        labels, full_target_tokens = target_ids(example.target, tokenizer, seq_len)
    return PairRow(ids, labels, seq_len, example.origin, full_tokens, full_target_tokens, example.target)


def target_ids(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> tuple[list[int], int]:
    """The tokens of a target, in the tokenizer's mode for targets, and how many there are before any is cut.

    They end with the end-of-text token, which the tokenizers of most encoder-decoders put there themselves; one that
    is cut does too.
    """
    end: int = tokenizer.eos_token_id
    ids: list[int] = tokenizer(text_target=text, verbose=False)["input_ids"]
    if ids[-1:] != [end]:
        ids = [*ids, end]
    return [*ids[: seq_len - 1], end] if len(ids) > seq_len else ids, len(ids)


class PairCollator:
    """Pads sources and targets on the right, each to a common length, and masks the padding.

    Called with rows it returns `input_ids` and `attention_mask` (0 in the padding), each int64 (B, S), and `labels`
    where the rows have some: int64 (B, T), −100 in the padding. S and T are those of the longest row, rounded up to a
    multiple of 8 but never above `max_tokens`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._pad_token_id = tokenizer.pad_token_id
        self._max_tokens = max_tokens

    def __call__(self, rows: Sequence[PairRow]) -> Batch:
        """The batch of `rows`."""
        batch = {
            "input_ids": self._padded([row.input_ids for row in rows], self._pad_token_id),
            "attention_mask": self._padded([[1] * len(row.input_ids) for row in rows], 0),
        }
        labels = [row.labels for row in rows if row.labels is not None]
        return {**batch, "labels": self._padded(labels, IGNORED)} if labels else batch

    def _padded(self, lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        import torch

        longest = max(map(len, lists))
        length = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self._max_tokens))
        return torch.tensor([[*own, *[value] * (length - len(own))] for own in lists], dtype=torch.int64)


def _collator(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
) -> Callable[[Sequence[PairRow]], Batch]:
    return PairCollator(tokenizer, seq_len)


# -------------------------------------------------------------------------------------------------------- scoring


def _score(model: Any, asked: Asked, config: BaseConfig) -> Scores:
    """The mean loss over all target tokens, and how close the greedy answers come to the targets as they were given.

    An answer may have a few tokens more than the longest target: that is the same for all, whatever their batches.
    """
    most = answers_of_pairs(asked.rows).new_tokens
    total, tokens = 0.0, 0
    answers: list[str] = []
    with undisturbed(model):
        for batch in asked.batches:
            labels = batch["labels"]
            total += float(sequence_loss(next_logits(model, batch), labels, 1, None))
            tokens += int((labels != IGNORED).sum())
            answers += generate(model, asked.tokenizer, batch, most)
    expected = [row.target or "" for row in asked.rows]
    loss = total / max(tokens, 1)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), **text_metrics(answers, expected)}
    texts = [{"expected": true, "answer": own} for true, own in zip(expected, answers, strict=True)]
    return Scores({**metrics, "tokens": tokens, "examples": len(answers)}, {"texts": texts})


def answers_of_pairs(rows: Sequence[PairRow]) -> Answers:
    """What is asked of a model that is scored on `rows`, whose targets are known."""
    sources, targets = [len(row.input_ids) for row in rows], [len(row.labels or ()) for row in rows]
    return Answers(len(rows), max(sources), max(targets) + MORE_TOKENS)


def next_logits(model: Any, batch: Batch) -> torch.Tensor:
    """The logits (B, T, V) of each target token, where the decoder is given those before it."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder_ids = own.prepare_decoder_input_ids_from_labels(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: torch.Tensor = model(**inputs, decoder_input_ids=decoder_ids).logits
    return logits


def greedy_settings(came_with: Any, config: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of a `GenerationConfig` for greedy answers, of a model that came with that one and `config`."""
    start = getattr(config, "decoder_start_token_id", None)  # in training it is always this one
    own = {"decoder_start_token_id": start, **came_with.to_diff_dict()}
    kept = {name: own[name] for name in KEPT if own.get(name) is not None}
    ends = end_ids(own.get("eos_token_id"), tokenizer)
    return {**kept, **GREEDY, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int) -> list[str]:
    """The greedy answers to the sources of `batch`, each ended by one of its `end_ids` or after `max_new_tokens`.

    Of the generation settings that the model came with only those in `KEPT` have a say. Call it within `undisturbed`.
    """
    from transformers import GenerationConfig

    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    came_with = own.generation_config
    settings = greedy_settings(came_with, own.config, tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own.generation_config = GenerationConfig(**settings)  # what is unset in one that is given comes from the model's
    try:
        out_BT = own.generate(**inputs, max_new_tokens=_room(model, max_new_tokens), use_cache=True)
    finally:
        own.generation_config = came_with
    texts: list[str] = tokenizer.batch_decode(out_BT, skip_special_tokens=True)
    return texts


def _room(model: Any, max_new_tokens: int) -> int:
    """The tokens that an answer may have before the decoder's positions end, the first of which its start takes."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return max_new_tokens if positions is None else max(1, min(max_new_tokens, positions - 1))


def _said(metrics: Mapping[str, float]) -> str:
    return (
        f"held-out loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, BLEU {metrics['bleu']:.1f}, "
        f"chrF {metrics['chrf']:.1f}, ROUGE-1/2/L {metrics['rouge1']:.1f}/{metrics['rouge2']:.1f}/"
        f"{metrics['rougeL']:.1f}"
    )


def _write(scores: Scores, folder: Path) -> None:
    """Write the figures and every answer beside what was expected."""
    write_json(folder / REPORT_FILE, {"metrics": scores.metrics, **scores.report})


# ------------------------------------------------------------------------------------------------------ answering


def _answer(model: Any, asked: Asked, config: BaseConfig) -> Iterator[dict[str, Any]]:
    for batch in asked.batches:
        for text in generate(model, asked.tokenizer, batch, asked.rows[0].max_tokens):
            yield {"text": text}


def _question(example: SourceTarget) -> dict[str, Any]:
    return {"source": example.source}


# -------------------------------------------------------------------------------------------------------- proving


def _inputs(row: PairRow) -> dict[str, list[int]]:
    """The model shifts the labels itself, and gives its decoder what comes before each."""
    return {"input_ids": row.input_ids, "labels": row.labels or []}


def _right(row: PairRow) -> list[int]:
    return row.labels or []


def _built_in(texts: Sequence[str]) -> list[SourceTarget]:
    return [SourceTarget(text, text, "a built-in text") for text in texts]


# ---------------------------------------------------------------------------------------------------------- audit


def _audit(examples: Sequence[SourceTarget], training: Sequence[SourceTarget]) -> list[tuple[str, str]]:
    """Sources with several targets, and those of the held-out examples that training shows."""
    by_source: dict[str, set[str | None]] = {}
    for example in examples:
        by_source.setdefault(example.source, set()).add(example.target)
    lines = [("sources with different targets", str(sum(len(own) > 1 for own in by_source.values())))]
    if examples is not training:
        shown = {example.source for example in training}
        lines.append(("sources that training shows too", str(sum(example.source in shown for example in examples))))
    copies = sum(example.source == example.target for example in examples)
    return [*lines, ("targets that repeat their source", str(copies))]


TASK = Task(
    TEXT2TEXT,
    Reader(
        read.fits,
        read.read,
        _resolve,
        encode,
        _audit,
        lambda example, row: example.target or "",
        columns=read.columns_of,
    ),
    Judge(
        _score,
        {"loss": False, "bleu": True, "chrf": True, "rouge1": True, "rouge2": True, "rougeL": True},
        "loss",
        _said,
        _write,
    ),
    _collator,
    Answering(read.read_unanswered, encode_unanswered, _answer, _question),
    Proving(_inputs, _right, _built_in),
)
