"""Text to text: an encoder reads a source, and a decoder says the target. Translation, summaries, short answers.

In the shapes: B rows, S positions of the source, T of the target, V tokens of the vocabulary. Padding is on the right
of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport, audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.tasks.decoding import AnswerLengths, end_ids, undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.proof import WRITTEN, ProofRow
from qlora_kit.tasks.rows import not_empty
from qlora_kit.tasks.task import Asked, Batch, Collate, Lines, Source, Task
from qlora_kit.tasks.task_model import TaskModel
from qlora_kit.tasks.text2text import read
from qlora_kit.tasks.text2text.metrics import text_metrics
from qlora_kit.tasks.text2text.read import SourceTarget

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

PAD_MULTIPLE = 8
MORE_TOKENS = 8  # that an answer may have beyond the longest one expected, so that one that goes on is seen to
TITLES = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
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
# encoder-decoders that start their answers from something else than `decoder_start_token_id` of their config.json
STARTS_OTHERWISE = ("fsmt", "mbart", "plbart", "t5gemma", "t5gemma2")


class SequenceModel(TaskModel):
    """An encoder with a decoder, whose own head says the target."""

    auto_class = "AutoModelForSeq2SeqLM"
    mapping = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
    endings = ("ForConditionalGeneration", "MTModel")
    peft_type = "SEQ_2_SEQ_LM"
    has_new_head = False
    decodes = True

    def suits(self, architecture: PretrainedConfig) -> bool:
        """Models that hear are in the same table, and some of them have no encoder of texts."""
        return bool(architecture.is_encoder_decoder)

    def why_unable(self, architecture: PretrainedConfig, task: str) -> str:
        """They are not made of two halves."""
        return f"has no encoder with a decoder, as {task} needs"

    def is_usual_for(self, architecture: PretrainedConfig) -> bool:
        """All that can do it are for it."""
        return self.has_class_for(architecture)

    def configure(self, architecture: PretrainedConfig, config: BaseConfig) -> None:
        """Check what the decoder needs. Raises `UserError`."""
        check_starts(architecture, config.model)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
    ) -> torch.Tensor:
        """See `sequence_loss`."""
        return sequence_loss(logits, labels, n_items)

    def score_pass(self, model: Any, batch: Batch) -> None:
        """The loss over the target's tokens; the answers are planned apart."""
        sequence_loss(next_logits(model, batch), batch["labels"], 1)


def check_starts(architecture: PretrainedConfig, model: str) -> None:
    """Check that an encoder with a decoder knows what its answers start from and are padded with. Raises `UserError`.

    Without, transformers fails at the first step.
    """
    if architecture.model_type in STARTS_OTHERWISE:
        return
    needed = ("decoder_start_token_id", "pad_token_id")
    missing = [name for name in needed if getattr(architecture, name, None) is None]
    if missing:
        rule = f"its config.json has no {' and no '.join(missing)}, which its decoder needs"
        raise UserError.of("model", model, rule, "Set it there, as the model was trained: often both are the same.")


def sequence_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, n_items: Any) -> torch.Tensor:
    """The summed cross-entropy of the tokens that a decoder is to say over `n_items`, in fp32; labels of −100 are none.

    transformers' own losses of encoder-decoders are means over a batch, whatever batches it is accumulated with.
    """
    from torch.nn import functional

    summed = functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
    scaled: torch.Tensor = summed / n_items
    return scaled


@dataclass(frozen=True, kw_only=True)
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


class TextToText(Task):
    """A source is read, and its target written."""

    name = "text2text-generation"
    model = SequenceModel()
    metrics: ClassVar[Mapping[str, bool]] = {
        "loss": False,
        "bleu": True,
        "chrf": True,
        "rouge1": True,
        "rouge2": True,
        "rougeL": True,
    }
    metric = "loss"
    settings = frozenset({"source_prefix"})
    proof_terms = WRITTEN

    # ----------------------------------------------------------------------------------------------------- reading

    def fits(self, columns: Set[str]) -> bool:
        """Whether there is a pair of a source and a target."""
        return read.fits(columns)

    def read(self, source: Source, config: BaseConfig) -> list[SourceTarget]:
        """The pairs. Raises `UserError`."""
        return read.read(source, config)

    def read_unanswered(self, source: Source) -> list[SourceTarget]:
        """The sources; targets may be there."""
        return read.read_unanswered(source)

    def resolve(self, config: BaseConfig, examples: Sequence[SourceTarget], setting: str) -> BaseConfig:
        """`config` with the task."""
        return replace(config, task=self.name)

    def columns(self, records: Sequence[Record], by_hand: dict[str, str]) -> dict[str, str]:
        """Which language is translated into which, as the training records have it."""
        return read.columns_of(records, by_hand)

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        config: RunConfig,
        examples: Sequence[SourceTarget],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> PairSet:
        """The tokens of `examples`, sources behind the prefix of `config`; source and target are each cut at `seq_len`.

        Raises `UserError` where there is no example, or no token that ends a target.
        """
        return _encoded(examples, tokenizer, seq_len, config.base, setting)

    def encode_unanswered(
        self, examples: Sequence[SourceTarget], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> PairSet:
        """The same of sources whose targets may not be known."""
        return _encoded(examples, tokenizer, seq_len, config, "data")

    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """See `PairCollator`."""
        return PairCollator(tokenizer.pad_token_id, seq_len)

    def audit(self, examples: Sequence[SourceTarget], training: Sequence[SourceTarget]) -> Lines:
        """Sources with several targets, and those of the held-out examples that training shows."""
        return _audit(examples, training)

    def length_lines(self, encoded: PairSet, seq_len: int) -> Lines:
        """How long sources and targets are, and how many of each are cut."""
        sources = length_line([row.full_tokens for row in encoded.rows])
        targets = length_line([row.full_target_tokens for row in encoded.rows])
        return [
            ("tokens of a source: min / median / p95 / max", sources),
            ("tokens of a target: min / median / p95 / max", targets),
            (f"sources truncated to {seq_len} tokens", str(sum(row.truncated for row in encoded.rows))),
            (f"targets truncated to {seq_len} tokens", str(sum(row.target_truncated for row in encoded.rows))),
        ]

    def learned(self, example: SourceTarget, row: PairRow, show: Callable[[int], str]) -> str:
        """The tokens of the target."""
        return "".join(f"«{show(token)}»" for token in row.labels or ())

    # ----------------------------------------------------------------------------------------------------- scoring

    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """The mean loss over all target tokens, and how close the greedy answers come to the targets as given.

        An answer may have a few tokens more than the longest target: that is the same for all, whatever their batches.
        """
        most = self.scored_answers(asked.rows).new_tokens
        total, tokens = 0.0, 0
        answers: list[str] = []
        with undisturbed(model):
            for batch in asked.batches:
                labels = batch["labels"]
                total += float(sequence_loss(next_logits(model, batch), labels, 1))
                tokens += int((labels != IGNORED).sum())
                answers += generate(model, asked.tokenizer, batch, most)
        expected = [row.target or "" for row in asked.rows]
        loss = total / max(tokens, 1)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), **text_metrics(answers, expected)}
        texts = [{"expected": true, "answer": own} for true, own in zip(expected, answers, strict=True)]
        return Scores({**metrics, "tokens": tokens, "examples": len(answers)}, {"texts": texts})

    def scored_answers(self, rows: Sequence[PairRow]) -> AnswerLengths:
        """An answer to each row, whose targets are known."""
        sources, targets = [len(row.input_ids) for row in rows], [len(row.labels or ()) for row in rows]
        return AnswerLengths(len(rows), max(sources), max(targets) + MORE_TOKENS)

    def said(self, metrics: Mapping[str, float]) -> str:
        """Loss, BLEU, chrF and ROUGE."""
        return (
            f"held-out loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
            f"BLEU {metrics['bleu']:.1f}, chrF {metrics['chrf']:.1f}, ROUGE-1/2/L "
            f"{metrics['rouge1']:.1f}/{metrics['rouge2']:.1f}/{metrics['rougeL']:.1f}"
        )

    def figures(self, metrics: Mapping[str, float]) -> list[str]:
        """BLEU, chrF and ROUGE, of 100."""
        return [f"{title} {metrics[name]:.1f}" for name, title in TITLES.items() if name in metrics]

    def answers(self, model: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """The greedy answers."""
        for batch in asked.batches:
            for text in generate(model, asked.tokenizer, batch, asked.rows[0].max_tokens):
                yield {"text": text}

    def question(self, example: SourceTarget) -> dict[str, Any]:
        """The source."""
        return {"source": example.source}

    # ------------------------------------------------------------------------------------------------ the release

    def saved_settings(self, config: BaseConfig, architecture: PretrainedConfig) -> BaseConfig:
        """The prefix of the sources, as `merge` writes it."""
        if config.source_prefix is not None:
            return config
        return replace(config, source_prefix=getattr(architecture, "prefix", None))

    def config_fields(self, config: BaseConfig, architecture: PretrainedConfig) -> dict[str, Any]:
        """The class, and the prefix of the sources under the name that transformers has for that."""
        has_prefix = config.source_prefix is not None or hasattr(architecture, "prefix")
        prefix = {"prefix": config.source_prefix or ""} if has_prefix else {}
        return {"architectures": [self.model.class_name(architecture)], **prefix}

    def generation_fields(
        self, own: GenerationConfig, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """What `predict` answers by, so that the release answers the same by itself."""
        return greedy_settings(own, architecture, tokenizer)

    def proof_row(self, row: PairRow) -> ProofRow:
        """The model shifts the labels itself, and gives its decoder what comes before each."""
        labels = row.labels or []
        return ProofRow({"input_ids": row.input_ids, "labels": labels}, [IGNORED, *labels])

    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """Each text is to be repeated."""
        examples = [SourceTarget(text, text, "a built-in text") for text in texts]
        return self.proof_rows(self.encode_unanswered(examples, tokenizer, seq_len, config), budget)

    def proof_prompt(
        self, example: Any, rows: Sequence[ProofRow], tokenizer: PreTrainedTokenizerBase, most: int
    ) -> list[int]:
        """The first source."""
        return rows[0].inputs["input_ids"]


TASK = TextToText()


# ------------------------------------------------------------------------------------------------------- encoding


def length_line(lengths: Sequence[int]) -> str:
    """The least, the median, the 95th percentile and the most of some lengths."""
    report = audit_lengths(lengths, [], [], max(lengths), empty=0, duplicates=0)
    found = (report.length_min, report.length_median, report.length_p95, report.length_max)
    return " / ".join(f"{length:g}" for length in found)


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
        raise UserError.of("tokenizer", name, rule, "Set eos_token in its tokenizer_config.json.")
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
    labels, full_target_tokens = None, 0
    if example.target is not None:
        labels, full_target_tokens = target_ids(example.target, tokenizer, seq_len)
    return PairRow(
        input_ids=not_empty(ids, tokenizer),
        labels=labels,
        max_tokens=seq_len,
        origin=example.origin,
        full_tokens=full_tokens,
        full_target_tokens=full_target_tokens,
        target=example.target,
    )


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

    def __init__(self, pad_token_id: int, max_tokens: int) -> None:
        self._pad_token_id = pad_token_id
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


# ------------------------------------------------------------------------------------------- scores and answers


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
