"""Text generation: a model learns what to say next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.columns import SHAPES, TARGETS, examples_from
from qlora_kit.model.task_models import GENERATION
from qlora_kit.tasks import decoding
from qlora_kit.tasks.task import Asked, Batch, Judge, Reader, Scores, Source, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _fits(columns: Set[str]) -> bool:
    return bool(columns) and (columns <= set(TARGETS) or any(set(shape.required) <= columns for shape in SHAPES))


def _read(source: Source, config: BaseConfig) -> list[data.Example]:
    return examples_from(source.records, source.columns, source.name, source.setting, source.learns_all)


def _resolve(config: BaseConfig, examples: Sequence[data.Example], setting: str) -> BaseConfig:
    return replace(config, task=GENERATION)


def _encode(
    config: RunConfig,
    examples: Sequence[data.Example],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    setting: str,
) -> data.EncodedSet:
    return data.encode_set(examples, tokenizer, seq_len=seq_len, train_on=config.data.train_on, setting=setting)


def _collator(tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig) -> Callable[[Sequence[Any]], Batch]:
    return data.Collator(tokenizer.pad_token_id, max_tokens=seq_len)


def _score(model: Any, asked: Asked, config: BaseConfig) -> Scores:
    loss = decoding.mean_loss(model, asked.batches)
    return Scores({"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens})


def _said(metrics: Mapping[str, float]) -> str:
    return f"held-out loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}"


TASK = Task(
    GENERATION,
    Reader(_fits, _read, _resolve, _encode, lambda examples, training: [], lambda example, row: example.completion),
    Judge(_score, {"loss": False}, "loss", _said),
    _collator,
)
