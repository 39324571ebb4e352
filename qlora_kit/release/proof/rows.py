"""What the live model and the release are both asked: rows of tokens, and a prompt to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError, named
from qlora_kit.model.source import load_model_config, max_positions
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.inputs import source_of
from qlora_kit.tasks import registry
from qlora_kit.tasks.proof import ProofRow, is_learned
from qlora_kit.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MAX_PROMPT_TOKENS = 256
ROOM_TOKENS = 32  # that the positions must leave for the answer to the prompt
DATA_USES = ("none", "preferred", "needed", "choice")  # what data there is, whether it must be read, and decides
BUILT_IN_SOURCE = "a built-in text"
BUILT_IN = (
    "The ferry leaves the harbour at eight in the morning and is back before dark. On Sundays it waits for the last "
    "bus. Whoever wants to take a bicycle along pays two crowns more, and children under six pay nothing at all.",
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it weighs less. This is "
    "why an egg takes longer to cook there: it is not the boiling that cooks it, but the heat.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total",
)


@dataclass(frozen=True, kw_only=True)
class ProofQuestions:
    """Rows with what is right in them (−100 where that is not known), a prompt, and where they are from.

    A row is what the model is called with: lists of numbers by the names of its arguments. Its `labels` have one place
    more than its logits have rows: the first one, for a text's first token, is never looked at. Only a task that
    writes has a prompt (of an encoder its source); `names` are those of the labels of a task that has some.

    `probe` is a text with its token ids and the chat template, which the release's own tokenizer must give too.
    `auto_class`, `outputs` and `options` say how the release's side, which knows no tasks, loads the model and calls
    it: transformers' class, the names of the logits among its outputs, and what it is called with beside a row.
    """

    rows: list[dict[str, list[int]]]
    labels: list[list[int]]
    prompt: list[int]
    end: int | None
    source: str
    probe: dict[str, Any]
    task: str
    names: list[str]
    auto_class: str
    outputs: list[str]
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return vars(self)

    @classmethod
    def read(cls, file: Path) -> ProofQuestions:
        """What `to_dict` gave, from a JSON file."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def ask(config: RunConfig, data_use: str, token_budget: int) -> ProofQuestions:
    """The questions of a run's proof, of `token_budget` tokens at most.

    They come from the held-out data of `config`, else from its training data; where `data_use` (of `DATA_USES`) says
    so, or allows it and these cannot be read, from a built-in text. Raises `UserError` for data that must be read.
    """
    architecture = load_model_config(config.base)
    task = registry.task_of(config.base, architecture)
    tokenizer = load_tokenizer(config.base)
    probe = _probe(tokenizer)  # as it was saved: `prepare` may add a template
    tokenizer = task.prepare(tokenizer)
    positions = max_positions(architecture)
    seq_len = data.resolve_seq_len(config.data.seq_len, tokenizer, positions)
    rows, example, source = _rows(config, task, data_use, token_budget, tokenizer, seq_len)
    if data_use == "choice" and not any(is_learned(row.labels) for row in rows):
        rule = f"has no answer within the first {token_budget} tokens, which are all there is time for"
        remedy = f"Give shorter examples, or choose {named('into')} yourself."
        raise UserError.of("data", config.data.data, rule, remedy)
    return ProofQuestions(
        rows=[row.inputs for row in rows],
        labels=[row.labels for row in rows],
        prompt=task.proof_prompt(example, rows, tokenizer, _prompt_room(positions)),
        end=tokenizer.eos_token_id,
        source=source,
        probe=probe,
        task=task.name,
        names=_label_names(task, architecture),
        auto_class=task.model.auto_class,
        outputs=list(task.model.proof_outputs),
        options=task.model.call_options,
    )


def _label_names(task: Task, architecture: PretrainedConfig) -> list[str]:
    if not task.model.has_labels:
        return []
    return [architecture.id2label[number] for number in range(architecture.num_labels)]


def _probe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    text = BUILT_IN[0][:60]
    return {"text": text, "ids": tokenizer(text)["input_ids"], "template": tokenizer.chat_template}


def _rows(
    config: RunConfig, task: Task, data_use: str, budget: int, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[Sequence[ProofRow], Any, str]:
    """Rows of the task, as far as the budget goes, the first example, and their source. Raises `UserError`."""
    if data_use != "none":
        try:
            examples, source = _examples(config, task)
            rows = task.proof_rows(task.encode(config, examples, tokenizer, seq_len, "data"), budget)
            return rows, examples[0], source
        except UserError:  # it was moved since; any text will do for a proof, but not for a choice
            if data_use in ("needed", "choice"):
                raise
    return task.built_in_rows(BUILT_IN, tokenizer, seq_len, config.base, budget), None, BUILT_IN_SOURCE


def _examples(config: RunConfig, task: Task) -> tuple[list[Any], str]:
    """The held-out examples, else those to train on, and their name for the report. Raises `UserError`."""
    held_out = config.data.held_out_source
    if held_out is not None:
        return _read(config, task, held_out, "eval_data"), f"held-out data `{held_out}`"
    examples = _read(config, task, config.data.data, "data")
    if config.data.eval_fraction:
        _, kept = data.split_examples(examples, config.data.eval_fraction, config.seed)
        return kept, f"the held-out share of `{config.data.data}`"
    return examples, f"`{config.data.data}`"


def _read(config: RunConfig, task: Task, source: str, setting: str) -> list[Any]:
    rows = data.read_rows(source, config.data.columns, setting)
    return task.read(source_of(config, rows, source, setting), config.base)


def _prompt_room(positions: int | None) -> int:
    return MAX_PROMPT_TOKENS if positions is None else max(1, min(MAX_PROMPT_TOKENS, positions - ROOM_TOKENS))
