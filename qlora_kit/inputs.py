"""What a run is fed: the tokenizer, the encoded training and held-out sets, and how they are batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit import base, data
from qlora_kit.config import RunConfig
from qlora_kit.errors import Faults, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Examples that stand in the place of those that the settings name: to train on, and to hold out."""

    train: list[data.Example]
    held_out: list[data.Example]


@dataclass(frozen=True)
class Inputs:
    """What is fed to the run: encoded sets, the held-out examples themselves, and the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train: data.EncodedSet | data.PackedSet
    evaluation: data.EncodedSet | data.PackedSet | None
    held_out: list[data.Example]
    seq_len: int
    report: data.AuditReport  # on the training examples
    plain_text: bool  # no training example has a prompt, so that none went through a template

    @property
    def longest_row(self) -> int:
        """The most tokens that a training row has; a packed one is filled up, however short its examples are."""
        if isinstance(self.train, data.PackedSet):
            return self.seq_len
        return min(self.seq_len, self.report.length_max)


def read_inputs(config: RunConfig, given: Examples | None = None) -> Inputs:
    """Read and encode the data that `config` names, or the examples `given` instead.

    Raises one `UserError` for all that is wrong with it.
    """
    faults = Faults()
    architecture = faults.collect(lambda: base.load_model_config(config.base))
    tokenizer = faults.collect(lambda: data.prepare_tokenizer(base.load_tokenizer(config.base)))
    seq_len = None
    if architecture is not None and tokenizer is not None:
        positions = base.max_positions(architecture)
        seq_len = faults.collect(lambda: data.resolve_seq_len(config.data.seq_len, tokenizer, positions))
    examples = faults.collect(
        lambda: data.read_examples(config.data.data, config.data.columns) if given is None else given.train
    )
    held_out = faults.collect(lambda: _read_held_out(config) if given is None else given.held_out)
    faults.raise_if_any()
    assert tokenizer is not None
    assert seq_len is not None
    assert examples is not None
    assert held_out is not None
    if config.data.eval_fraction and given is None:
        examples, held_out = data.split_examples(examples, config.data.eval_fraction, config.seed)
    train_set = encode(config, examples, tokenizer, seq_len, "--data")
    eval_set = encode(config, held_out, tokenizer, seq_len, "--eval-data") if held_out else None
    plain_text = all(example.prompt is None and example.messages is None for example in examples)
    if not config.data.pack:
        return Inputs(tokenizer, train_set, eval_set, held_out, seq_len, train_set.report, plain_text)
    packed = data.pack(train_set, seq_len)
    packed_eval = data.pack(eval_set, seq_len) if eval_set is not None else None
    return Inputs(tokenizer, packed, packed_eval, held_out, seq_len, train_set.report, plain_text)


def _read_held_out(config: RunConfig) -> list[data.Example]:
    source = config.data.held_out_source
    return [] if source is None else data.read_examples(source, config.data.columns, "--eval-data")


def training_examples(config: RunConfig) -> list[data.Example]:
    """The examples that a run of `config` trains on, without those that it holds out. Raises `UserError`."""
    examples = data.read_examples(config.data.data, config.data.columns)
    return data.split_examples(examples, config.data.eval_fraction, config.seed)[0]


def held_out_examples(config: RunConfig) -> list[data.Example]:
    """The examples that a run of `config` does not train on: its own data for it, or the share that it splits off.

    Empty where it holds nothing out. Raises `UserError` for data that cannot be read.
    """
    if not config.data.eval_fraction:
        return _read_held_out(config)
    examples = data.read_examples(config.data.data, config.data.columns)
    return data.split_examples(examples, config.data.eval_fraction, config.seed)[1]


def encode(
    config: RunConfig, examples: list[data.Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, setting: str
) -> data.EncodedSet:
    """The tokens of `examples` as `config` lays them out and cuts them; `setting` is the one that errors name."""
    return data.encode_set(examples, tokenizer, seq_len=seq_len, train_on=config.data.train_on, setting=setting)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Check that the model has an embedding for every token. Raises `UserError`."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        rule = f"has token ids up to {largest}, and the model's vocabulary ends at {rows - 1}"
        raise UserError.of("--tokenizer", tokenizer.name_or_path, rule, "Give the tokenizer that belongs to the model.")


def make_collator(config: RunConfig, model: Any, inputs: Inputs) -> data.Collator:
    """Pads rows, or lays packed ones out so that no example sees another. Raises `UserError` where it cannot."""
    pad = inputs.tokenizer.pad_token_id
    packed = [rows for rows in (inputs.train, inputs.evaluation) if isinstance(rows, data.PackedSet)]
    if not packed:
        return data.Collator(pad, max_tokens=inputs.seq_len)
    from qlora_kit.lean import varlen

    if varlen.is_on(model.config):
        return data.Collator(pad, packed=True, max_tokens=inputs.seq_len, varlen=True)
    mask_dtype = data.packed_mask_dtype(model.config, max(rows.longest_tokens for rows in packed))
    return data.Collator(pad, packed=True, max_tokens=inputs.seq_len, mask_dtype=mask_dtype)
