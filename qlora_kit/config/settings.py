"""Every setting of the toolkit, declared once: its type, default, rule and help.

The command line, configuration files and the Python API all read these dataclasses; no default stands anywhere else.
`None` means "unset": the setting's help says what happens then.
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

from qlora_kit.config.rules import (
    Checked,
    Rule,
    above,
    at_least,
    convert,
    fields_of,
    fraction,
    one_of,
    setting,
    wrong_type,
)
from qlora_kit.errors import Fault, Faults, UserError, named

Schedule = ("cosine", "linear", "constant", "constant_with_warmup")
Init = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
VARIANTS = {"lora": "LoRA", "lora-xs": "LoRA-XS"}  # setting: name in texts
DEFAULT_SEQ_LEN = 1024  # tokens; with --seq-len unset, unless the model has fewer positions
DEFAULT_ASKED = 50  # prompts that eval answers if neither --exact-match nor the run sets a number
DEFAULT_NEW_TOKENS = 256  # longest answer, with --max-new-tokens unset
DEFAULT_TRIALS = 20  # combinations that a TPE search tries, with --trials unset
PER_CALL = ("out", "overwrite", "resume")  # belong to one call, not to the run: dropped when run.json is reused


def _numbers(text: str) -> frozenset[int] | None:
    """The numbers in `0-11,15`; None if `text` is not such a list."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            return None
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def _is_rank_pattern(ranks: Mapping[str, int]) -> bool:
    return all(re.fullmatch(r"[\w.]+", name, re.ASCII) and r >= 1 for name, r in ranks.items())


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Checked):
    """The frozen base model."""

    model: str = setting("demo", "local folder, hub id or 'demo'", metavar="MODEL")
    revision: str | None = setting(None, "branch, tag or commit of a hub model", metavar="NAME")
    weights: str = setting(
        "pretrained",
        "random: seeded, no download, and --model may be an architecture or a config.json",
        one_of("pretrained", "random"),
    )
    bits: int = setting(4, "4: NF4, 8: LLM.int8, 16: plain LoRA, 32: for debugging", one_of(4, 8, 16, 32))
    quant_type: str = setting("nf4", "4-bit data type", one_of("nf4", "fp4"))
    double_quant: bool = setting(True, "also quantize the quantization constants (4 bits)")
    allow_16_bit_experts: bool = setting(
        False,
        "train a mixture of experts at 4 or 8 bits, although its experts stay in 16 bits and get no factors",
        rare=True,
    )
    full: bool = setting(False, "train every weight instead of adapters (needs --bits 16 or 32)")
    tokenizer: str | None = setting(None, "tokenizer folder or hub id; unset: the model's own", metavar="MODEL")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    device: str = setting("auto", "auto: CUDA if there is a device, else the CPU", one_of("auto", "cuda", "cpu"))
    task: str | None = setting(
        None,
        "what the model is trained to do; unset: inferred from the data's columns and the model",
        choices="qlora_kit.tasks.registry:names",
    )
    labels: tuple[str, ...] | None = setting(
        None,
        "names of the classes, in order; unset: those in the training data",
        Rule("must be at least one name, all different", lambda v: len(v) > 0 and all(v) and len(set(v)) == len(v)),
    )
    multi_label: bool | None = setting(None, "an example may have several labels; unset: yes if any example does")
    source_prefix: str | None = setting(
        None, "text before each source of text2text-generation, e.g. 'summarize: '", metavar="TEXT"
    )

    def extra_faults(self) -> Iterator[Fault]:
        if self.labels is not None and len(self.labels) < 2 and not self.multi_label:
            remedy = f"Add the others, or {named('multi_label', 'true')}."
            yield Fault("labels", ",".join(self.labels), "must be at least two", remedy)
        if self.full and self.bits not in (16, 32):
            rule = f"needs unquantized weights, not {named('bits', self.bits)}"
            yield Fault("full", True, rule, f"Add {named('bits', 16)}.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """The LoRA factors on the base."""

    r: int = setting(16, "rank of the LoRA factors", at_least(1))
    alpha: float | None = setting(None, "numerator of the LoRA scaling; unset: 2 r", above(0))
    dropout: float = setting(0.0, "dropout on the adapter's input", fraction())
    targets: tuple[str, ...] | None = setting(
        None,
        "comma-separated layer names; unset: every linear layer in the blocks",
        Rule("must name at least one layer", lambda v: all(v) and len(v) > 0),
    )
    layers: str | None = setting(
        None,
        "blocks to adapt, by number, e.g. 0-11,15; unset: all",
        Rule("must be block numbers and ranges, like 0-11,15", lambda v: _numbers(v) is not None),
        metavar="N-N,…",
    )
    rank_pattern: dict[str, int] = setting(  # noqa: RUF009  (it returns a field with a factory)
        {},
        "ranks of single layers by name, e.g. c_attn=32,mlp.c_proj=8; the first match wins; the scaling stays the same",
        Rule("must map layer names to ranks of at least 1, like c_attn=32", lambda v: _is_rank_pattern(v)),
        rare=True,
    )
    adapter_dtype: str = setting("bf16", "dtype of the factors", one_of("bf16", "fp32"))
    rslora: bool = setting(False, "scale by alpha / sqrt(r) (rsLoRA)")
    dora: bool = setting(False, "weight-decomposed adapters (DoRA)")
    variant: str = setting(
        "lora",
        "lora-xs: factors from the SVD of the weight, frozen; an r × r matrix between them trains",
        one_of(*VARIANTS),
    )
    init: str = setting("default", "initial values of the factors", one_of(*Init))

    @property
    def resolved_alpha(self) -> float:
        return 2 * self.r if self.alpha is None else self.alpha

    @property
    def blocks(self) -> frozenset[int] | None:
        """The blocks to adapt; None for all."""
        return None if self.layers is None else _numbers(self.layers)

    @property
    def differs_by_block(self) -> bool:
        """Whether the settings may treat blocks differently."""
        names = [*(self.targets or ()), *self.rank_pattern]
        return self.layers is not None or any(part.isdigit() for name in names for part in name.split("."))

    @property
    def doubles_rank(self) -> bool:
        """Whether the initial factors are kept, frozen, beside the ones that train."""
        return self.init in ("pissa", "olora")

    def alpha_of(self, r: int) -> float:
        """The alpha that gives factors of rank `r` the same scaling as those of rank `self.r`."""
        if r == self.r:
            return self.resolved_alpha
        share = r / self.r
        return self.resolved_alpha * (math.sqrt(share) if self.rslora else share)

    def extra_faults(self) -> Iterator[Fault]:
        if self.variant == "lora-xs" and self.init != "default":
            rule = f"sets factors that train, and {named('variant', 'lora-xs')} freezes its factors"
            yield Fault("init", self.init, rule, "Drop one of the two.")
        if self.dora and (self.variant == "lora-xs" or self.init in ("pissa", "olora", "loftq")):
            method = named("variant", "lora-xs") if self.variant == "lora-xs" else named("init", self.init)
            rule = f"cannot be combined with {method}, which starts from another weight"
            yield Fault("dora", True, rule, "Drop one of the two.")
        if self.init in ("orthogonal", "pissa", "olora", "loftq") and self.adapter_dtype == "bf16":
            rule = f"would round away the steps of the large factors that {named('init', self.init)} starts with"
            yield Fault("adapter_dtype", "bf16", rule, f"Add {named('adapter_dtype', 'fp32')}.")
        if self.init == "orthogonal":
            for name, r in (("r", self.r), *(("rank_pattern", r) for r in self.rank_pattern.values())):
                if r % 2:
                    rule = f"is odd, and {named('init', 'orthogonal')} needs even ranks"
                    yield Fault(name, r, rule, "Give an even rank.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What the model is trained on."""

    data: str = setting("demo", "file (jsonl json csv tsv parquet txt), folder, hub data set or 'demo'", metavar="DATA")
    eval_data: str | None = setting(None, "held-out data, in the same forms; 'demo' brings its own", metavar="DATA")
    eval_fraction: float = setting(0.0, "share of --data to hold out, if there is no --eval-data", fraction())
    columns: dict[str, str] = setting(  # noqa: RUF009  (it returns a field with a factory)
        {}, "name the columns yourself, e.g. prompt=a,completion=b"
    )
    train_on: str = setting("answer", "what is learned: the answers, or all of the text", one_of("answer", "all"))
    seq_len: int | None = setting(
        None, "longest example in tokens; unset: the model's positions, at most 1024", at_least(2)
    )
    pack: bool = setting(False, "several examples in one row; neither attention nor loss crosses over")

    @property
    def held_out_source(self) -> str | None:
        """Where the held-out examples come from; None if they are split off the training data, or there are none."""
        if self.eval_data is None and self.data == "demo" and not self.eval_fraction:
            return "demo"  # brings its own held-out part
        return self.eval_data

    @property
    def holds_out(self) -> bool:
        """Whether some examples are held out of training."""
        return self.held_out_source is not None or self.eval_fraction > 0

    def extra_faults(self) -> Iterator[Fault]:
        if self.eval_data is not None and self.eval_fraction:
            rule = f"cannot be combined with {named('eval_data')}"
            yield Fault("eval_fraction", self.eval_fraction, rule, "Give one of the two.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """How the factors are trained."""

    optim: str | None = setting(
        None,
        "optimizer; unset: paged_adamw_8bit at 4 bits on CUDA, else adamw",
        choices="qlora_kit.optim.optimizers:OPTIMIZERS",
    )
    lr: float = setting(2e-4, "peak learning rate", above(0))
    lora_plus: float | None = setting(
        None,
        "LoRA+: learning rate of the factors B as a multiple of --lr; unset: 1",
        above(0),
    )
    schedule: str = setting("cosine", "learning rate schedule", one_of(*Schedule))
    warmup: float = setting(0.03, "share of the steps spent warming up", fraction())
    clip: float = setting(1.0, "largest gradient norm", above(0))
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least(0))
    batch_size: int = setting(4, "examples in a forward pass", at_least(1))
    grad_accum: int = setting(1, "forward passes in an optimizer step", at_least(1))
    epochs: float = setting(1.0, "passes over the data", above(0))
    max_steps: int | None = setting(None, "optimizer steps; overrides --epochs", at_least(1))
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass", group="memory")
    class_weights: str = setting(
        "none",
        "balanced: rare classes weigh more in the loss",
        one_of("none", "balanced"),
    )
    neftune: float | None = setting(
        None, "NEFTune: uniform noise on the embeddings, at most this / sqrt(tokens · features)", above(0), rare=True
    )
    adversarial: str | None = setting(
        None,
        "train on each batch a second time, its embeddings moved so that the loss grows",
        one_of("fgm", "pgd"),
        rare=True,
    )
    # about 2 % of the norm of a sentence's embeddings, as in Miyato et al.; with 1.0 MiniLM learned nothing on SST-2
    adversarial_epsilon: float = setting(
        0.1, "norm by which the embeddings of an example are moved", above(0), rare=True
    )
    adversarial_steps: int = setting(3, "steps of pgd", at_least(1), rare=True)
    rank_penalty: float | None = setting(
        None, "penalty on the rank of the weight change: this times the sum of its singular values", above(0), rare=True
    )

    def extra_faults(self) -> Iterator[Fault]:
        of = {"adversarial_epsilon": ("fgm", "pgd"), "adversarial_steps": ("pgd",)}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in of and value != f.default and self.adversarial not in of[f.name]:
                methods = " and ".join(named("adversarial", method) for method in of[f.name])
                remedy = f"Add {named('adversarial', of[f.name][0])}, or drop it."
                yield Fault(f.name, value, f"applies only to {methods}", remedy)


@dataclass(frozen=True, kw_only=True)
class LeanConfig(Checked):
    """The pieces of the lean step: they change the memory and time of a step, not what it computes."""

    lean: str = setting("on", "off: the stock step, without any lean piece", one_of("on", "off"))
    chunked_loss: bool = setting(
        True, "compute the loss on supervised tokens only, a few at a time, without full logits", rare=True
    )
    lora_first: bool = setting(True, "linear layers run their factors first and save nothing dequantized", rare=True)
    half_blocks: str = setting(
        "auto",
        "checkpoint attention and MLP separately; auto: with offloaded activations",
        one_of("auto", "on", "off"),
        rare=True,
    )
    offload_activations: str = setting(
        "auto", "keep checkpoints in host memory; auto: on CUDA", one_of("auto", "on", "off")
    )
    offload_embedding: str = setting(
        "auto",
        "keep the input embedding in host memory; auto: if the run would not fit otherwise",
        one_of("auto", "on", "off"),
        rare=True,
    )
    flat_buffer: bool = setting(
        True, "all factors and gradients in one buffer: one optimizer call, states that can page", rare=True
    )
    tiled_mlp: bool = setting(True, "run the MLP on parts of a long sequence, one after the other", rare=True)
    rms_norm: bool = setting(True, "RMS norms save their input only, not an fp32 copy of it", rare=True)
    tanh_gelu: bool = setting(True, "gelu_new as one operation, without temporaries", rare=True)
    maskless_padding: bool = setting(
        True, "no attention mask for padding on the right, since no token sees it", rare=True
    )
    attention_by_row: str = setting(
        "auto",
        "attention with dropout, one row of the batch at a time; auto: on a CPU",
        one_of("auto", "on", "off"),
        rare=True,
    )
    varlen: bool = setting(True, "with --pack, attend within each example, without a mask over the row", rare=True)

    def resolved(self, device_type: str) -> LeanConfig:
        """These settings with every `auto` decided, for a run on `device_type` that has enough memory."""
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


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
    """When the run evaluates on held-out data, and what it keeps."""

    eval_steps: int | None = setting(
        None,
        "steps between evaluations; unset: as --save-steps, else each epoch",
        at_least(1),
    )
    exact_match: int | None = setting(
        None, "held-out prompts to answer before and after, to count exact matches", at_least(1)
    )
    metric: str | None = setting(
        None,
        "decides the best checkpoint and early stopping; unset: the task's own",
        metavar="NAME",
    )
    early_stopping: int | None = setting(
        None, "stop after this many evaluations without a better --metric", at_least(1)
    )
    keep_best: bool = setting(True, "end with the best evaluation's adapter, not the last")
    save_steps: int | None = setting(
        None, "write a checkpoint every this many steps; unset: at each evaluation or epoch", at_least(1)
    )
    keep_checkpoints: int = setting(2, "checkpoints to keep, besides the best one", at_least(1))


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """One training run: all its settings."""

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
    out: str | None = setting(None, "run folder; unset: runs/<model>-<time>", metavar="PATH")
    overwrite: bool = setting(False, "replace an existing run folder")
    resume: str | None = setting(None, "continue from a run folder or one of its checkpoints", metavar="FOLDER")
    preflight: bool = setting(True, "plan the memory first; on CUDA refuse what cannot fit", group="memory")
    profile: bool = setting(False, "measure the first steps' memory, into profile.json and profile.png", group="memory")
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


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Checked):
    """How a search chooses settings by cross-validation; each combination that it tries is a `RunConfig`."""

    folds: int = setting(5, "parts of the training data; each is held out once", at_least(2))
    metric: str = setting(
        "auto", "metric that decides, also within a run: loss, exact_match, f1, …; auto: the task's own", metavar="NAME"
    )
    budget: str | None = setting(
        None, "skip combinations that are planned to need more memory: 8GiB, 6000MiB, 24GB", metavar="SIZE"
    )
    sampler: str = setting(
        "grid", "grid: every combination; tpe: Optuna's, led by earlier results", one_of("grid", "tpe")
    )
    trials: int | None = setting(None, f"combinations that tpe tries; unset: {DEFAULT_TRIALS}", at_least(1))
    prune: str = setting(
        "auto",
        "stop a combination whose best mean so far is worse than the others' median; auto: with tpe",
        one_of("auto", "on", "off"),
    )
    keep_runs: bool = setting(False, "keep adapter and checkpoints of every fold")

    @property
    def prunes(self) -> bool:
        return self.prune == "on" or (self.prune == "auto" and self.sampler == "tpe")

    def extra_faults(self) -> Iterator[Fault]:
        if self.trials is not None and self.sampler == "grid":
            tpe = named("sampler", "tpe")
            yield Fault("trials", self.trials, f"applies only to {tpe}: a grid is tried whole", f"Add {tpe}.")

    @classmethod
    def names(cls) -> set[str]:
        """The names of its settings."""
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> SearchConfig:
        """Build from the settings in `flat` that are its own; raises one `UserError` with every fault."""
        values: dict[str, Any] = {}
        with Faults() as faults:
            for f, hint in fields_of(cls):
                if f.name in flat:
                    with faults.collecting():
                        values[f.name] = _converted(f.name, flat[f.name], hint)
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
    values: dict[str, dict[str, Any]] = {group: {} for group in ["", *GROUPS]}
    built: dict[str, Any] = {}
    with Faults() as faults:
        for name, value in flat.items():
            if name not in known:
                faults.add(_unknown(name, value, list(known)))
                continue
            group, hint = known[name]
            with faults.collecting():
                values[group][name] = _converted(name, value, hint)
        for group, cls in GROUPS.items():
            with faults.collecting():
                built[group] = cls(**values[group])
        with faults.collecting():
            config = RunConfig(**values[""], **built)
    return config


def _converted(name: str, value: object, hint: Any) -> Any:
    """`value` as the setting `name` has it. Raises `UserError`."""
    try:
        return convert(value, hint)
    except ValueError as error:
        raise UserError([wrong_type(name, value, str(error))]) from None


def _unknown(name: str, value: object, known: list[str]) -> Fault:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"Did you mean {named(near[0])}?" if near else "`qlora-kit train --help` lists all settings."
    return Fault(name, value, "is not a setting", remedy)
