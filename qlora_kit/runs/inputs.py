"""What a run is fed: the tokenizer, the encoded training and held-out sets, and how they are batched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import Fault, Faults, UserError, named, said_of
from qlora_kit.model import heads
from qlora_kit.model.source import load_model_config, max_positions
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks import registry
from qlora_kit.tasks.task import Source, Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


Unread = dict[str, dict[str, int]]
"""The fields that nothing reads, of what in words (`DATA`, …), each with the number of records that have it."""
DATA, HELD_OUT = "the data", "the held-out data"


@dataclass(frozen=True)
class Examples:
    """Examples that stand in the place of those that the settings name: to train on, and to hold out."""

    train: list[Any]
    held_out: list[Any]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is fed to the run: encoded sets, the held-out examples themselves, and the tokenizer."""

    config: RunConfig  # with the task, its labels and all else that the data decides
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Any  # an encoded set of the task; of texts an `EncodedSet` or a `PackedSet`
    evaluation: Any  # the same; None where nothing is held out
    held_out: Sequence[Any]
    seq_len: int
    report: data.AuditReport  # on the training examples
    plain_text: bool  # no training example has a prompt, so that none went through a template
    unread: Unread = field(default_factory=dict)

    @property
    def longest_row(self) -> int:
        """The most tokens that a training row has; a packed one is filled up, however short its examples are."""
        return self._longest(self.train)

    @property
    def longest_held_out(self) -> int:
        """The same of the held-out rows; 0 where there are none."""
        return 0 if self.evaluation is None else self._longest(self.evaluation)

    def _longest(self, rows: Any) -> int:
        return self.seq_len if isinstance(rows, data.PackedSet) else min(self.seq_len, rows.report.length_max)


@dataclass(frozen=True, kw_only=True)
class Material:
    """The examples of a run, read and not encoded yet: to train on, and held out."""

    config: RunConfig  # with what they decide
    task: Task
    train: list[Any]
    held_out: list[Any]
    unread: Unread = field(default_factory=dict)


def read_inputs(config: RunConfig, given: Examples | None = None) -> Inputs:
    """Read and encode the data that `config` names, or the examples `given` instead, which decide nothing about it.

    Raises one `UserError` for all that is wrong.
    """
    architecture = tokenizer = material = seq_len = None
    with Faults() as faults:
        with faults.collecting():
            architecture = load_model_config(config.base)
        with faults.collecting():
            tokenizer = load_tokenizer(config.base)
        with faults.collecting():
            material = _collect_material(config, architecture, faults) if given is None else _material_of(config, given)
        if material is not None:
            with faults.collecting():
                _check_settings(material.config, material.task)
        if tokenizer is not None:
            with faults.collecting():
                # where it is not known what is asked of it, what every task asks
                data.prepare_tokenizer(tokenizer, False) if material is None else material.task.prepare(tokenizer)
        if architecture is not None and tokenizer is not None:
            with faults.collecting():
                seq_len = data.resolve_seq_len(config.data.seq_len, tokenizer, max_positions(architecture))
    assert tokenizer is not None
    assert seq_len is not None
    assert material is not None
    return _encoded(material, tokenizer, seq_len)


def read_material(config: RunConfig) -> Material:
    """The examples of a run, and what they decide about it. Raises one `UserError` for all that is wrong with them."""
    architecture = material = None
    with Faults() as faults:
        with faults.collecting():
            architecture = load_model_config(config.base)
        material = _collect_material(config, architecture, faults)
    assert material is not None
    return material


def _collect_material(config: RunConfig, architecture: PretrainedConfig | None, faults: Faults) -> Material | None:
    """The examples as far as they can be read; None where `faults` took note of anything about them.

    Raises `UserError` for a task that there is not.
    """
    source = config.data.data
    rows = split = resolved = rest = None
    with faults.collecting():
        rows = data.read_rows(source, config.data.columns)
    task = registry.choose(config.base, rows or [], config.data.columns, architecture)
    config = with_columns(config, task, rows or [])
    base = dataclasses.replace(config.base, task=task.name)
    if architecture is not None:
        with faults.collecting():
            load_model_config(base)  # may be unable to do what the data is for
    if rows is not None:
        with faults.collecting():
            split = _read_training(config, task, base, rows)
    if split is not None:
        with faults.collecting():
            resolved = _resolve(task, base, *split)
    with faults.collecting():
        rest = _read_held_out(config, task, resolved or base)
    if split is None or rest is None or resolved is None:
        return None
    held_out, of_held_out = rest
    unread = _unread(source, rows or [], of_held_out)
    return Material(
        config=dataclasses.replace(config, base=resolved),
        task=task,
        train=split[0],
        held_out=split[1] or held_out,
        unread=unread,
    )


def _unread(source: str, rows: list[data.Record], of_held_out: dict[str, int]) -> Unread:
    """What nothing reads: fields of the data and of the held-out data, and whole files of a folder."""
    unread = {DATA: data.unread_fields(rows), HELD_OUT: of_held_out}
    left_out = dict.fromkeys(data.files_left_out(source), 0)  # whole, so that no count of records goes with them
    return {**unread, f"the folder {source}": left_out} if left_out else unread


def with_columns(config: RunConfig, task: Task, records: list[data.Record]) -> RunConfig:
    """`config` with the columns that the training `records` decide on, where none are mapped by hand."""
    columns = task.columns(records, config.data.columns)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, columns=columns))


def _material_of(config: RunConfig, given: Examples) -> Material:
    task = registry.task_named(config.base.task)
    return Material(config=config, task=task, train=given.train, held_out=given.held_out)


def _read_training(
    config: RunConfig, task: Task, base: BaseConfig, rows: list[data.Record]
) -> tuple[list[Any], list[Any]]:
    """The examples to train on, and the share of them that is held out."""
    examples = task.read(source_of(config, rows), base)
    return data.split_examples(examples, config.data.eval_fraction, config.seed)


def source_of(config: RunConfig, rows: list[data.Record], name: str | None = None, setting: str = "data") -> Source:
    """What `rows`, of the data of `config` or of those called `name`, are to be read as."""
    return Source(
        records=rows,
        name=config.data.data if name is None else name,
        columns=config.data.columns,
        setting=setting,
        learns_all=config.data.train_on == "all",
    )


def _resolve(task: Task, base: BaseConfig, train: list[Any], held_out: list[Any]) -> BaseConfig:
    """`base` with what the data decide, of which `held_out` is a share: the labels of either, if `train` has enough.

    Raises `UserError`.
    """
    of_all = task.resolve(base, [*train, *held_out], "data")
    return task.resolve(of_all, train, "data") if held_out else of_all


def _read_held_out(config: RunConfig, task: Task, resolved: BaseConfig) -> tuple[list[Any], dict[str, int]]:
    """The examples of a held-out source, and the fields that were not read; empty where there is none."""
    source = config.data.held_out_source
    if source is None:
        return [], {}
    rows = data.read_rows(source, config.data.columns, "eval_data")
    examples = task.read(source_of(config, rows, source, "eval_data"), resolved)
    return examples, data.unread_fields(rows)


OF_SOME_TASKS = ("class_weights", "source_prefix", "labels", "multi_label", "pack", "exact_match")


def _check_settings(config: RunConfig, task: Task) -> None:
    """Check the settings that only some tasks have. Raises one `UserError` with every fault."""
    values = {**vars(config.base), **vars(config.optim), **vars(config.data), **vars(config.evaluation)}
    with Faults() as faults:
        with faults.collecting():
            registry.metric_of(task, config.evaluation.metric)
        for name in OF_SOME_TASKS:
            value = values[name]
            if name not in task.settings and value not in (None, False, "none", ()):
                said = ",".join(value) if isinstance(value, tuple) else value
                rule = f"does not apply to {named('task', task.name)}"
                faults.add(Fault(name, said, rule, f"Drop {named(name)}."))


def _encoded(material: Material, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Inputs:
    config, task = material.config, material.task
    train_set = task.encode(config, material.train, tokenizer, seq_len, "data")
    eval_set = None
    if material.held_out:
        of_data = config.data.eval_fraction > 0
        setting = "data" if of_data else "eval_data"
        eval_set = task.encode_held_out(config, material.held_out, tokenizer, seq_len, setting)
    inputs = Inputs(
        config=config,
        task=task,
        tokenizer=tokenizer,
        train=train_set,
        evaluation=eval_set,
        held_out=material.held_out,
        seq_len=seq_len,
        report=train_set.report,
        plain_text=task.is_plain_text(material.train),
        unread=material.unread,
    )
    if not config.data.pack:
        return inputs
    packed_eval = data.pack(eval_set, seq_len) if eval_set is not None else None
    return dataclasses.replace(inputs, train=data.pack(train_set, seq_len), evaluation=packed_eval)


def digest_of(examples: Sequence[Any]) -> str:
    """A hash of what the examples hold, wherever they stand."""
    hashed = hashlib.sha256()
    for example in examples:
        content = {name: value for name, value in dataclasses.asdict(example).items() if name != "origin"}
        hashed.update(json.dumps(content, sort_keys=True).encode())
    return f"sha256:{hashed.hexdigest()}"


def held_out_examples(config: RunConfig) -> tuple[list[Any], dict[str, int]]:
    """The examples that a run of `config` does not train on: its own data for it, or the share that it splits off.

    With them the fields of that data that were not read, and how many records have each. Empty where it holds nothing
    out. Raises `UserError` for data that cannot be read.
    """
    task = registry.task_named(config.base.task)
    if not config.data.eval_fraction:
        return _read_held_out(config, task, config.base)
    rows = data.read_rows(config.data.data, config.data.columns)
    examples = task.read(source_of(config, rows), config.base)
    held_out = data.split_examples(examples, config.data.eval_fraction, config.seed)[1]
    return held_out, data.unread_fields(rows)


def examples_to_score(config: RunConfig, source: str | None) -> tuple[list[Any], str, Unread]:
    """The examples in `source`, or without one those that a run of `config` held out; and in words what they are.

    With them the fields that were not read. Raises `UserError` where there are none, or they cannot be read.
    """
    if source is not None:
        held_out = dataclasses.replace(config.data, eval_data=source, eval_fraction=0.0)
        config = dataclasses.replace(config, data=held_out)
    with said_of("data", instead_of="eval_data"):
        examples, fields = held_out_examples(config)
    unread = {DATA: fields}
    if not examples:
        raise UserError.of(
            "data", source, "is required: the run has no held-out data", f"Give {named('data', 'FILE')}."
        )
    if source is not None:
        return examples, source, unread
    if config.data.eval_fraction:
        return examples, f"{config.data.data} (the {config.data.eval_fraction:g} of it that the run held out)", unread
    return examples, f"{config.data.held_out_source} (held out by the run)", unread


def batches_of(
    rows: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    size: int,
    device: torch.device,
    tick: Callable[[int], None] = lambda count: None,
) -> Iterator[dict[str, Any]]:
    """The encoded `rows` in their order, `size` at a time, on `device`; `tick` counts those that were gone through."""
    for start in range(0, len(rows), size):
        part = [rows[index] for index in range(start, min(start + size, len(rows)))]
        yield {name: tensor.to(device) for name, tensor in collate(part).items()}
        tick(len(part))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Check that the model has an embedding for every token. Raises `UserError`."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        rule = f"has token ids up to {largest}, and the model's vocabulary ends at {rows - 1}"
        raise UserError.of("tokenizer", tokenizer.name_or_path, rule, "Give the tokenizer that belongs to the model.")


def weigh_labels(model: Any, inputs: Inputs) -> None:
    """Put the weights of the labels into the loss of `model`, where the settings ask for some."""
    if inputs.config.optim.class_weights != "none":
        heads.set_weights(model, inputs.task.label_weights(inputs.train, inputs.config.base))


def make_collator(model: Any, inputs: Inputs) -> Any:
    """Pads rows, or lays packed ones out so that no example sees another. Raises `UserError` where it cannot."""
    packed = [rows for rows in (inputs.train, inputs.evaluation) if isinstance(rows, data.PackedSet)]
    if not packed:
        return inputs.task.collator(inputs.tokenizer, inputs.seq_len)
    from qlora_kit.lean import varlen

    pad = inputs.tokenizer.pad_token_id
    if varlen.is_on(model.config):
        return data.Collator(pad, packed=True, max_tokens=inputs.seq_len, varlen=True)
    mask_dtype = data.packed_mask_dtype(model.config, max(rows.longest_tokens for rows in packed))
    return data.Collator(pad, packed=True, max_tokens=inputs.seq_len, mask_dtype=mask_dtype)
