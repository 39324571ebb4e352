"""What the live model and the release are both asked: rows of tokens, and a prompt to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.config.settings import RunConfig
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError
from qlora_kit.model.source import load_model_config, max_positions
from qlora_kit.model.task_models import GENERATION, TASK_MODELS, task_of
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks import registry
from qlora_kit.tasks.inputs import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROW_TOKENS = 512
MAX_PROMPT_TOKENS = 256
ROOM_TOKENS = 32  # that the positions must leave for the answer to the prompt
DATA_USES = ("none", "preferred", "needed", "choice")  # what data there is, whether it must be read, and decides
BUILT_IN = (
    "The ferry leaves the harbour at eight in the morning and is back before dark. On Sundays it waits for the last "
    "bus. Whoever wants to take a bicycle along pays two crowns more, and children under six pay nothing at all.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it weighs less. This is "
    "why an egg takes longer to cook there: it is not the boiling that cooks it, but the heat.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total",
)


@dataclass(frozen=True)
class Questions:
    """Rows with what is supervised in them (−100 where nothing is), a prompt, and where they are from.

    A row is what the model is called with: lists of numbers by the names of its arguments. Its `labels` have one place
    more than its logits have rows: the first one, for a text's first token, is never looked at. Only a task that
    writes has a prompt (of an encoder its source); `names` are those of the labels of a task that has some.

    `probe` is a text with its token ids and the chat template, which the release's own tokenizer must give too.
    """

    rows: list[dict[str, list[int]]]
    labels: list[list[int]]
    prompt: list[int]
    end: int | None
    source: str
    probe: dict[str, Any]
    task: str = GENERATION
    names: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return vars(self)

    @classmethod
    def read(cls, file: Path) -> Questions:
        """What `to_dict` gave, from a JSON file."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def ask(config: RunConfig, data_use: str, token_budget: int) -> Questions:
    """The questions of a run's proof, of `token_budget` tokens at most.

    They come from the held-out data of `config`, else from its training data; where `data_use` (of `DATA_USES`) says
    so, or allows it and these cannot be read, from a built-in text. Raises `UserError` for data that must be read.
    """
    architecture = load_model_config(config.base)
    task = task_of(config.base.task, architecture)
    tokenizer = load_tokenizer(config.base)
    probe = _probe(tokenizer)
    tokenizer = data.prepare_tokenizer(tokenizer, task == GENERATION)
    positions = max_positions(architecture)
    seq_len = data.resolve_seq_len(config.data.seq_len, tokenizer, positions)
    if task != GENERATION:
        rows, labels, source = _of_task(config, registry.task_named(task), data_use, token_budget, tokenizer, seq_len)
        has_labels = TASK_MODELS[task].has_labels
        names = [architecture.id2label[number] for number in range(architecture.num_labels)] if has_labels else []
        prompt = rows[0]["input_ids"] if TASK_MODELS[task].decodes else []
        return Questions(rows, labels, prompt, tokenizer.eos_token_id, source, probe, task, names)
    if data_use == "none":
        return _built_in(tokenizer, token_budget, seq_len, probe)
    try:
        examples, source = _examples(config)
    except UserError:  # it was moved since; any text will do for a proof, but not for a choice
        if data_use in ("needed", "choice"):
            raise
        return _built_in(tokenizer, token_budget, seq_len, probe)
    encoded = data.encode_set(examples, tokenizer, seq_len=seq_len, train_on=config.data.train_on).rows
    kept, marks = _within(token_budget, [row.input_ids for row in encoded], [row.labels for row in encoded])
    if data_use == "choice" and not any(map(_is_supervised, marks)):
        rule = f"has no answer within the first {token_budget} tokens, which are all there is time for"
        raise UserError.of("--data", config.data.data, rule, "Give shorter examples, or choose --into yourself.")
    prompt = data.encode_prompt(examples[0], tokenizer)[-_prompt_room(positions) :]
    return Questions(_as_inputs(kept), marks, prompt, tokenizer.eos_token_id, source, probe)


def _probe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    text = BUILT_IN[0][:60]
    return {"text": text, "ids": tokenizer(text)["input_ids"], "template": tokenizer.chat_template}


def _as_inputs(rows: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids} for ids in rows]


def _of_task(
    config: RunConfig,
    task: registry.Task,
    data_use: str,
    token_budget: int,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> tuple[list[dict[str, list[int]]], list[list[int]], str]:
    """Whole rows of the task, as far as the budget goes, what is right for them, and their source.

    Raises `UserError`.
    """
    assert task.answering is not None, "only text generation has none"
    assert task.proving is not None, "only text generation has none"
    rows: list[Any] = []
    source = "a built-in text"
    if data_use != "none":
        try:
            examples, source = _examples(config)
            rows = task.reader.encode(config, examples, tokenizer, seq_len, "--data").rows
        except UserError:
            if data_use in ("needed", "choice"):
                raise
    if not rows:
        rows = task.answering.encode(task.proving.built_in(BUILT_IN), tokenizer, seq_len, config.base).rows
    inputs = [task.proving.inputs(row) for row in rows]
    totals = accumulate(max(map(len, row.values())) for row in inputs)
    count = sum(total <= token_budget for total in totals) or 1
    return inputs[:count], [[IGNORED, *task.proving.answers(row)] for row in rows[:count]], source


def _examples(config: RunConfig) -> tuple[list[Any], str]:
    """The held-out examples, else those to train on, and their name for the report. Raises `UserError`."""
    held_out = config.data.held_out_source
    if held_out is not None:
        return _read(config, held_out, "--eval-data"), f"held-out data `{held_out}`"
    examples = _read(config, config.data.data, "--data")
    if config.data.eval_fraction:
        _, kept = data.split_examples(examples, config.data.eval_fraction, config.seed)
        return kept, f"the held-out share of `{config.data.data}`"
    return examples, f"`{config.data.data}`"


def _read(config: RunConfig, source: str, setting: str) -> list[Any]:
    rows = data.read_rows(source, config.data.columns, setting)
    reader = registry.task_named(config.base.task).reader
    return reader.read(source_of(config, rows, source, setting), config.base)


def _within(
    budget: int, rows: Sequence[list[int]], labels: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The first rows in which something is learned, each cut at `MAX_ROW_TOKENS`, and the last where the budget ends.

    Where no row has anything to learn within that, the first rows as they are.
    """
    kept_rows: list[list[int]] = []
    kept_labels: list[list[int]] = []
    some_learn = any(_is_supervised(marks[: min(MAX_ROW_TOKENS, budget)]) for marks in labels)
    for ids, marks in zip(rows, labels, strict=True):
        length = min(len(ids), MAX_ROW_TOKENS, budget)
        if length < 2:
            break
        if some_learn and not _is_supervised(marks[:length]):
            continue
        kept_rows.append(ids[:length])
        kept_labels.append(marks[:length])
        budget -= length
    return kept_rows, kept_labels


def _is_supervised(marks: Sequence[int]) -> bool:
    """Whether any token but the first, which nothing predicts, is learned."""
    return any(mark != IGNORED for mark in marks[1:])


def _prompt_room(positions: int | None) -> int:
    return MAX_PROMPT_TOKENS if positions is None else max(1, min(MAX_PROMPT_TOKENS, positions - ROOM_TOKENS))


def _built_in(tokenizer: PreTrainedTokenizerBase, budget: int, seq_len: int, probe: dict[str, Any]) -> Questions:
    every = [ids[:seq_len] for ids in tokenizer(list(BUILT_IN))["input_ids"]]
    rows, _ = _within(budget, every, every)
    prompt = every[0][: min(8, seq_len)]
    return Questions(_as_inputs(rows), rows, prompt, tokenizer.eos_token_id, "a built-in text", probe)
