"""Every setting of the toolkit, declared once: its type, default, rule and help.

The command line, configuration files and the Python door all read these dataclasses; nothing else in the
project holds a default. `None` means "unset": what then follows is documented in the setting's help.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.config.rules import Checked, Rule, above, at_least, convert, fields_of, flag, fraction, one_of, setting
from qlora_kit.errors import Fault, UserError

Optim = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw", "adamw_8bit", "lion_8bit", "sgd")
Schedule = ("cosine", "linear", "constant", "constant_with_warmup")
Init = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
VARIANTS = {"lora": "LoRA", "lora-xs": "LoRA-XS"}  # as they are written
DEFAULT_SEQ_LEN = 1024  # tokens an example may have where neither --seq-len nor the model's positions say less
DEFAULT_ASKED = 50  # prompts that eval answers where neither --exact-match nor the run says
DEFAULT_NEW_TOKENS = 256  # most tokens of an answer where --max-new-tokens does not say
DEFAULT_TRIALS = 20  # combinations that a search by TPE tries where --trials does not say
PER_CALL = ("out", "overwrite", "resume")  # say where one call writes, not what the run is: a repeat drops them


def _numbers(text: str) -> frozenset[int] | None:
    """The numbers in `0-11,15`; None where it is no such list."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            return None
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def _is_rank_pattern(ranks: Mapping[str, int]) -> bool:
    return all(re.fullmatch(r"[\w.]+", name, re.ASCII) and r >= 1 for name, r in ranks.items())


@dataclass(frozen=True)
class BaseConfig(Checked):
    """The frozen base model."""

    model: str = setting(
        "demo", "local folder, hub id, 'demo', or with --weights random an architecture or config.json"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    weights: str = setting(
        "pretrained",
        "pretrained | random (seeded, nothing downloaded: for memory and speed work)",
        one_of("pretrained", "random"),
    )
    bits: int = setting(4, "4 (NF4) | 8 (LLM.int8) | 16 (plain LoRA) | 32 (debugging)", one_of(4, 8, 16, 32))
    quant_type: str = setting("nf4", "4-bit data type: nf4 | fp4", one_of("nf4", "fp4"))
    double_quant: bool = setting(True, "quantize the quantization constants too (4 bits)")
    allow_16_bit_experts: bool = setting(
        False, "train a mixture of experts at 4 or 8 bits although its experts stay in 16, without factors"
    )
    full: bool = setting(False, "train every weight instead of adapters (needs --bits 16 or 32)")
    tokenizer: str | None = setting(None, "tokenizer folder or hub id; unset: the model's own")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    device: str = setting("auto", "auto | cuda | cpu", one_of("auto", "cuda", "cpu"))
    task: str | None = setting(None, "what to train for; unset: what the data's columns and the model's kind say")
    labels: tuple[str, ...] | None = setting(
        None,
        "comma-separated names of the classes, in their order; unset: those of the training data",
        Rule("must be different names, at least one", lambda v: len(v) > 0 and all(v) and len(set(v)) == len(v)),
    )
    multi_label: bool | None = setting(None, "an example may have several labels; unset: where the data has any such")
    source_prefix: str | None = setting(
        None, "text before each source of text2text-generation, with its space at the end: 'summarize: '"
    )

    def extra_faults(self) -> Iterator[Fault]:
        if self.labels is not None and len(self.labels) < 2 and not self.multi_label:
            yield Fault("--labels", ",".join(self.labels), "must be two at least", "Or add --multi-label true.")
        if self.full and self.bits not in (16, 32):
            yield Fault("--full", True, f"needs unquantized weights, and --bits is {self.bits}", "Add --bits 16.")


@dataclass(frozen=True)
class AdapterConfig(Checked):
    """The LoRA factors on the base."""

    r: int = setting(16, "rank of the LoRA factors", at_least(1))
    alpha: float | None = setting(None, "LoRA scaling numerator; unset: 2 r", above(0))
    dropout: float = setting(0.0, "dropout on the adapter's input", fraction())
    targets: tuple[str, ...] | None = setting(
        None,
        "comma-separated layer names; unset: every linear layer in the blocks",
        Rule("must name at least one layer", lambda v: all(v) and len(v) > 0),
    )
    layers: str | None = setting(
        None,
        "numbers of the blocks to adapt, e.g. 0-11,15; unset: all",
        Rule("must be numbers of blocks and ranges of them like 0-11", lambda v: _numbers(v) is not None),
    )
    rank_pattern: dict[str, int] = setting(  # noqa: RUF009  (it returns a field with a factory)
        {},
        "other ranks for layers by name, e.g. c_attn=32,mlp.c_proj=8; the first that fits counts, the scaling stays",
        Rule("must give names of layers a rank of at least 1 like c_attn=32", lambda v: _is_rank_pattern(v)),
    )
    adapter_dtype: str = setting("bf16", "dtype of the factors: bf16 | fp32", one_of("bf16", "fp32"))
    rslora: bool = setting(False, "scale by alpha / sqrt(r) (rsLoRA)")
    dora: bool = setting(False, "weight-decomposed adapters (DoRA)")
    variant: str = setting(
        "lora",
        "lora | lora-xs (frozen factors from the SVD of the weight, and r × r weights between them that train)",
        one_of(*VARIANTS),
    )
    init: str = setting("default", " | ".join(Init) + ": how the factors begin", one_of(*Init))

    @property
    def resolved_alpha(self) -> float:
        return 2 * self.r if self.alpha is None else self.alpha

    @property
    def blocks(self) -> frozenset[int] | None:
        """The blocks to adapt; None for all."""
        return None if self.layers is None else _numbers(self.layers)

    @property
    def differs_by_block(self) -> bool:
        """Whether the settings may tell one block from another."""
        names = [*(self.targets or ()), *self.rank_pattern]
        return self.layers is not None or any(part.isdigit() for name in names for part in name.split("."))

    @property
    def doubles_rank(self) -> bool:
        """Whether the factors have a frozen half, what they were at the beginning, beside the one that trains."""
        return self.init in ("pissa", "olora")

    def alpha_of(self, r: int) -> float:
        """The numerator with which factors of rank `r` are scaled as those of the rank that was set."""
        if r == self.r:
            return self.resolved_alpha
        share = r / self.r
        return self.resolved_alpha * (math.sqrt(share) if self.rslora else share)

    def extra_faults(self) -> Iterator[Fault]:
        if self.variant == "lora-xs" and self.init != "default":
            rule = "is for factors that train, and those of --variant lora-xs are frozen"
            yield Fault("--init", self.init, rule, "Drop one of the two.")
        if self.dora and (self.variant == "lora-xs" or self.init in ("pissa", "olora", "loftq")):
            method = "--variant lora-xs" if self.variant == "lora-xs" else f"--init {self.init}"
            yield Fault(
                "--dora", True, f"cannot go with {method}, which begins at another weight", "Drop one of the two."
            )
        if self.init in ("orthogonal", "pissa", "olora", "loftq") and self.adapter_dtype == "bf16":
            rule = f"would lose the steps of --init {self.init}, whose factors begin at full size, in rounding"
            yield Fault("--adapter-dtype", "bf16", rule, "Add --adapter-dtype fp32.")
        if self.init == "orthogonal":
            for name, r in (("r", self.r), *(("rank_pattern", r) for r in self.rank_pattern.values())):
                if r % 2:
                    yield Fault(flag(name), r, "is odd, and --init orthogonal needs even ranks", "Use an even one.")


@dataclass(frozen=True)
class DataConfig(Checked):
    """What the model is fed."""

    data: str = setting("demo", "'demo', a file (jsonl json csv tsv parquet txt), a folder, or a hub data set")
    eval_data: str | None = setting(None, "held-out data, in the same forms; unset: 'demo' brings its own")
    eval_fraction: float = setting(0.0, "share of the training data to hold out instead", fraction())
    columns: dict[str, str] = setting(  # noqa: RUF009  (it returns a field with a factory)
        {}, "map columns by hand, e.g. prompt=a,completion=b"
    )
    train_on: str = setting(
        "answer", "supervise the answer only, or all of the text: answer | all", one_of("answer", "all")
    )
    seq_len: int | None = setting(
        None, "tokens an example may have; unset: the model's positions, 1024 at most", at_least(2)
    )
    pack: bool = setting(False, "put several examples in one row, without attention or loss across them")

    @property
    def held_out_source(self) -> str | None:
        """Where the held-out examples come from; None where they are split off, or there are none."""
        if self.eval_data is None and self.data == "demo" and not self.eval_fraction:
            return "demo"  # it brings its own
        return self.eval_data

    @property
    def holds_out(self) -> bool:
        """Whether some examples are held out of training."""
        return self.held_out_source is not None or self.eval_fraction > 0

    def extra_faults(self) -> Iterator[Fault]:
        if self.eval_data is not None and self.eval_fraction:
            yield Fault("--eval-fraction", self.eval_fraction, "cannot go with --eval-data", "Give one of the two.")


@dataclass(frozen=True)
class OptimConfig(Checked):
    """How the factors are trained."""

    optim: str | None = setting(
        None, " | ".join(Optim) + "; unset: paged_adamw_8bit at 4 bits on CUDA, else adamw", one_of(*Optim)
    )
    lr: float = setting(2e-4, "peak learning rate", above(0))
    lora_plus: float | None = setting(
        None,
        "LoRA+: learning rate of the factors B as a multiple of --lr, which is that of A; unset: the same",
        above(0),
    )
    schedule: str = setting("cosine", " | ".join(Schedule), one_of(*Schedule))
    warmup: float = setting(0.03, "share of the steps spent warming up", fraction())
    clip: float = setting(1.0, "largest gradient norm", above(0))
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least(0))
    batch_size: int = setting(4, "examples in a forward pass", at_least(1))
    grad_accum: int = setting(1, "forward passes in an optimizer step", at_least(1))
    epochs: float = setting(1.0, "passes over the data", above(0))
    max_steps: int | None = setting(None, "optimizer steps; wins over --epochs", at_least(1))
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    class_weights: str = setting(
        "none",
        "weights of the classes in the loss: none | balanced (the rarer, the heavier)",
        one_of("none", "balanced"),
    )
    neftune: float | None = setting(
        None, "NEFTune: uniform noise on the embeddings, of up to this / sqrt(tokens · features)", above(0)
    )
    adversarial: str | None = setting(
        None,
        "train on each batch again with its embeddings moved to where the loss grows: fgm | pgd",
        one_of("fgm", "pgd"),
    )
    # some 2 % of the norm of a sentence's embeddings, as in Miyato et al.; with 1.0 MiniLM learned nothing of SST-2
    adversarial_epsilon: float = setting(0.1, "how far the embeddings of an example are moved, as a norm", above(0))
    adversarial_steps: int = setting(3, "steps in which pgd moves them", at_least(1))
    rank_penalty: float | None = setting(
        None, "penalty on the rank of the change: this times the sum of its singular values", above(0)
    )

    def extra_faults(self) -> Iterator[Fault]:
        of = {"adversarial_epsilon": ("fgm", "pgd"), "adversarial_steps": ("pgd",)}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in of and value != f.default and self.adversarial not in of[f.name]:
                rule = f"is a setting of --adversarial {' and '.join(of[f.name])}"
                yield Fault(flag(f.name), value, rule, f"Add --adversarial {of[f.name][0]}, or drop it.")


@dataclass(frozen=True)
class LeanConfig(Checked):
    """The pieces of the lean step: they change what a step takes, not what it computes."""

    lean: str = setting("on", "on | off (the stock step: none of the pieces below)", one_of("on", "off"))
    chunked_loss: bool = setting(True, "the loss over supervised tokens only, a few at a time, without whole logits")
    lora_first: bool = setting(True, "linear layers that run their factors first and save nothing dequantized")
    half_blocks: str = setting(
        "auto",
        "checkpoint attention and MLP apart: auto (with offloaded activations) | on | off",
        one_of("auto", "on", "off"),
    )
    offload_activations: str = setting(
        "auto", "keep checkpoints in the host's memory: auto (on CUDA) | on | off", one_of("auto", "on", "off")
    )
    offload_embedding: str = setting(
        "auto",
        "keep the input embedding in the host's memory: auto (where the run would not fit) | on | off",
        one_of("auto", "on", "off"),
    )
    flat_buffer: bool = setting(True, "all factors and gradients in one buffer: one optimizer call, states that page")
    tiled_mlp: bool = setting(True, "run the MLP on a part of a long sequence at a time")
    rms_norm: bool = setting(True, "RMS norms that keep their input only, and no copy of it in fp32")
    tanh_gelu: bool = setting(True, "gelu_new as one operation without temporaries")
    maskless_padding: bool = setting(True, "no attention mask for padding on the right, which no token sees")
    attention_by_row: str = setting(
        "auto",
        "attention with dropout one row of the batch at a time: auto (on a CPU) | on | off",
        one_of("auto", "on", "off"),
    )
    varlen: bool = setting(True, "with --pack, attend within each example without a mask over the row")

    def resolved(self, device_type: str) -> LeanConfig:
        """With every `auto` decided for a run on `device_type` whose memory is not short."""
        on_cuda = "on" if device_type == "cuda" else "off"
        offload = on_cuda if self.offload_activations == "auto" else self.offload_activations
        half = offload if self.half_blocks == "auto" else self.half_blocks
        embedding = "off" if self.offload_embedding == "auto" else self.offload_embedding
        on_cpu = "on" if device_type == "cpu" else "off"
        by_row = on_cpu if self.attention_by_row == "auto" else self.attention_by_row
        return dataclasses.replace(
            self,
            offload_activations=offload,
            half_blocks=half,
            offload_embedding=embedding,
            attention_by_row=by_row,
        )


@dataclass(frozen=True)
class EvalConfig(Checked):
    """When the run looks at held-out data, and what it keeps."""

    eval_steps: int | None = setting(
        None,
        "evaluate every so many steps; unset: with --save-steps, else each epoch",
        at_least(1),
    )
    exact_match: int | None = setting(
        None, "answer so many held-out prompts before and after, and count exact matches", at_least(1)
    )
    metric: str | None = setting(
        None,
        "what the best checkpoint and --early-stopping follow; unset: the loss of texts, the F1 of classes or entities",
    )
    early_stopping: int | None = setting(None, "stop after so many evaluations without a better metric", at_least(1))
    keep_best: bool = setting(True, "end with the adapter of the best evaluation, not the last")
    save_steps: int | None = setting(
        None, "checkpoint every so many steps; unset: at each evaluation or epoch", at_least(1)
    )
    keep_checkpoints: int = setting(2, "checkpoints to keep (the best one besides)", at_least(1))


@dataclass(frozen=True)
class RunConfig(Checked):
    """One training run: every setting there is."""

    base: BaseConfig = field(default_factory=BaseConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lean: LeanConfig = field(default_factory=LeanConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    seed: int = setting(
        42,
        "seed of the factors, the data order and random weights",
        Rule(f"must be from 0 to {2**32 - 1}", lambda v: 0 <= v < 2**32),
    )
    out: str | None = setting(None, "run folder; unset: runs/<model>-<time>")
    overwrite: bool = setting(False, "replace an existing run folder")
    resume: str | None = setting(None, "continue from a run folder or one of its checkpoints")
    preflight: bool = setting(True, "plan the memory first, and on CUDA refuse a run that cannot fit")
    profile: bool = setting(
        False, "measure the memory of the first steps; profile.json and profile.png in the run folder"
    )
    report_to: tuple[str, ...] = setting(
        (),
        "also log to tensorboard, wandb (comma-separated)",
        Rule("must be among tensorboard, wandb", lambda v: set(v) <= {"tensorboard", "wandb"}),
    )

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> RunConfig:
        """Build from `{setting name: text or value}`; raises one `UserError` with every fault."""
        return _build(flat)


@dataclass(frozen=True)
class SearchConfig(Checked):
    """How settings are chosen by cross-validation; what is trained with each of them is a `RunConfig`."""

    folds: int = setting(5, "parts of the training data; each is held out once", at_least(2))
    metric: str = setting(
        "auto", "what decides, and what the runs follow: loss, exact_match, f1, …; auto: the task's own"
    )
    budget: str | None = setting(None, "rule out, before it runs, what is planned to need more: 8GiB, 6000MiB, 24GB")
    sampler: str = setting(
        "grid", "grid (every combination) | tpe (Optuna's, led by what went well)", one_of("grid", "tpe")
    )
    trials: int | None = setting(None, f"combinations that tpe tries; unset: {DEFAULT_TRIALS}", at_least(1))
    prune: str = setting(
        "auto",
        "stop a combination when its best mean so far is worse than the others' median: auto (with tpe) | on | off",
        one_of("auto", "on", "off"),
    )
    keep_runs: bool = setting(False, "keep the adapter and the checkpoints of every fold")

    @property
    def prunes(self) -> bool:
        return self.prune == "on" or (self.prune == "auto" and self.sampler == "tpe")

    def extra_faults(self) -> Iterator[Fault]:
        if self.trials is not None and self.sampler == "grid":
            yield Fault("--trials", self.trials, "is of --sampler tpe: a grid is tried whole", "Add --sampler tpe.")

    @classmethod
    def names(cls) -> set[str]:
        """The names of its settings."""
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> SearchConfig:
        """Build from those of `flat` that are its settings; raises one `UserError` with every fault."""
        faults: list[Fault] = []
        values: dict[str, Any] = {}
        for f, hint in fields_of(cls):
            if f.name in flat:
                _convert_into(values, f.name, flat[f.name], hint, faults)
        if faults:
            raise UserError(faults)
        return cls(**values)


GROUPS: dict[str, type[Checked]] = {
    "base": BaseConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "lean": LeanConfig,
    "evaluation": EvalConfig,
}


def settings() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every setting of a run: the name of its group ('' for the run's own), its field, and its resolved type."""
    groups: dict[str, type[Checked]] = {**GROUPS, "": RunConfig}
    for group, cls in groups.items():
        for f, hint in fields_of(cls):
            if cls is not RunConfig or f.name not in GROUPS:
                yield group, f, hint


def _build(flat: Mapping[str, object]) -> RunConfig:
    known = {f.name: (group, hint) for group, f, hint in settings()}
    faults: list[Fault] = []
    values: dict[str, dict[str, Any]] = {group: {} for group in ["", *GROUPS]}
    for name, value in flat.items():
        if name not in known:
            faults.append(_unknown(name, value, list(known)))
            continue
        group, hint = known[name]
        _convert_into(values[group], name, value, hint, faults)
    built: dict[str, Any] = {}
    for group, cls in GROUPS.items():
        try:
            built[group] = cls(**values[group])
        except UserError as error:
            faults.extend(error.faults)
    try:
        config = RunConfig(**values[""], **built)
    except UserError as error:
        faults.extend(error.faults)
    if faults:
        raise UserError(faults)
    return config


def _convert_into(values: dict[str, Any], name: str, value: object, hint: Any, faults: list[Fault]) -> None:
    try:
        values[name] = convert(value, hint)
    except ValueError as error:
        faults.append(Fault(flag(name), value, str(error), "See --help."))


def _unknown(name: str, value: object, known: list[str]) -> Fault:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"Did you mean {flag(near[0])}?" if near else "See --help for all settings."
    return Fault(flag(name), value, "is not a setting", remedy)
