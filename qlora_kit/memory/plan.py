"""The plan: what a run will take of a GPU's memory, when, and for what, before anything is loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import unquantized
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.memory import rules, stages
from qlora_kit.memory.extrapolate import DEEP, SHALLOW, NotEvenError, extrapolate
from qlora_kit.memory.loading import loading_components
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.simulate import STEPS, Recipe, Record, resolve_cuda_optim, simulate
from qlora_kit.memory.stages import AnswerBatch, Occasion, Stage
from qlora_kit.memory.track import CATEGORIES, Peak, peaks_by_region
from qlora_kit.model import architectures, source
from qlora_kit.optim.adversarial import passes_of
from qlora_kit.system.progress import LOADING, STEP
from qlora_kit.tasks import registry
from qlora_kit.tasks.decoding import NOTHING_HELD_OUT, HeldOut

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_TOKENS = 1024  # an example's, where neither the settings nor the model's positions say less
MODEL_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What the code of an architecture raises where it needs values, or where an operator has no kernel on `meta`."""


class CannotPlanError(UserError):
    """The model of the settings does not run on `meta`; that says nothing about whether it trains."""

    def __init__(self, model: str, reason: str) -> None:
        self.reason = reason
        rule = f"its memory cannot be planned ({reason})"
        remedy = "`qlora-kit profile` measures a few steps of it instead; `train` runs it without a plan."
        super().__init__([Fault("--model", model, rule, remedy)])


@dataclass(frozen=True)
class Point:
    """The most live bytes in one part of the step; `components` sums to `live_bytes`."""

    step: int
    phase: str
    block: int | None
    recomputes: bool
    live_bytes: int
    operation: str
    components: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted memory of a run on a GPU; all sizes are bytes.

    `peak_bytes` is the step's: it predicts `torch.cuda.max_memory_allocated` of it, reached in `phase` at `operation`,
    and `components` sums to it exactly. `stages` has the peaks of all that the run does (of "loading", "evaluation",
    "generation" and "step" those that there are); the run fits when the largest of them fits. `extras` come on top of
    that one and outside torch's counter (context, fragmentation, paged states); of them, and on the host, are the
    `host_bytes` of checkpoints, in pinned memory. `series` has a point for every phase of
    the step, and every block in it, in their order: the second step, after what the first showed. `phases` is the peak
    of each phase over all steps. A step takes `passes` forward and backward passes over each batch. `answers` is there
    where the run answers prompts as many at once as it has room for. `unplanned` says why evaluation and generation
    are missing, where the model does not do them on `meta`.
    """

    peak_bytes: int
    phase: str
    block: int | None
    operation: str
    components: dict[str, int]
    extras: tuple[rules.Extra, ...]
    host_bytes: int
    phases: dict[str, Point]
    series: tuple[Point, ...]
    n_parameters: int
    n_trainable: int
    layers: int
    exact: bool
    batch_size: int
    seq_len: int
    optim: str
    attention: str
    passes: int
    gpu: str | None
    stages: dict[str, Stage]
    answers: AnswerBatch | None
    unplanned: str

    @property
    def largest_stage(self) -> str:
        """The phase of the run that takes the most, for which the GPU must have room; of equal ones the step."""
        return max(self.stages, key=lambda name: (self.stages[name].peak_bytes, name == STEP))

    @property
    def largest(self) -> Stage:
        """The same phase itself."""
        return self.stages[self.largest_stage]

    @property
    def beside_bytes(self) -> int:
        """What lies on the GPU beside what torch counts."""
        return sum(extra.n_bytes for extra in self.extras if extra.on_device)

    @property
    def device_bytes(self) -> int:
        """What the GPU must have free: the largest peak of the run and everything beside it."""
        return self.largest.peak_bytes + self.beside_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        more = {"device_bytes": self.device_bytes, "largest_stage": self.largest_stage}
        return {**dataclasses.asdict(self), **more}


def plan(
    config: RunConfig,
    *,
    exact: bool = False,
    gpu: rules.Gpu | None = None,
    autocast: bool = False,
    held_out: HeldOut | None = None,
    room_bytes: int = 0,
) -> MemoryPlan:
    """Predict the memory of the run `config` on `gpu` (by default one of compute capability 8), without one.

    Nothing is downloaded but, for a hub model, its config.json. Layers that are all equal are simulated three and
    four deep and extrapolated (likewise groups of them that repeat), unless `exact`. `autocast` plans fp32 weights
    under autocast, as transformers' Trainer runs with `bf16=True` (a baseline: this toolkit does not train so).
    `held_out` says what is evaluated and answered; by default what the settings let expect (see `stages.assumed`).
    As many prompts are answered at once as take no more than the step, or than `room_bytes` where that is more.
    Raises `UserError`, and of its kind `CannotPlanError` for a model that does not run on `meta`.
    """
    architecture = resolve_architecture(config)
    recipe = Recipe(
        resolve_tokens(config, architecture),
        resolve_cuda_optim(config),
        autocast,
        rules.DEFAULT_CAPABILITY if gpu is None else gpu.capability,
    )
    if held_out is None:
        held_out = stages.assumed(config, recipe.seq_len) if config.data.holds_out else NOTHING_HELD_OUT
    task, positions = registry.task_of(config.base, architecture).model, source.max_positions(architecture)
    occasions = stages.occasions(config, held_out, recipe.seq_len, task, positions)
    with failures_named(config):
        try:
            found, unplanned = _run(config, recipe, architecture, exact, occasions), ""
        except MODEL_FAILURES as error:  # the step itself may do all the same
            found, occasions, unplanned = _run(config, recipe, architecture, exact, ()), (), _first_line(error)
    return _plan_of(config, recipe, architecture, *found, gpu, occasions, unplanned, room_bytes)


@contextmanager
def failures_named(config: RunConfig) -> Iterator[None]:
    """Turn what the model of `config` raises on `meta` into a `CannotPlanError`."""
    try:
        yield
    except MODEL_FAILURES as error:
        raise CannotPlanError(config.base.model, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def resolve_architecture(config: RunConfig) -> PretrainedConfig:
    """The architecture to plan: of a known name without any download, else as `base.load_model_config` finds it."""
    model = config.base.model
    if model.lower() in architectures.ARCHITECTURES and not Path(model).exists():
        return source.with_labels(architectures.named_config(model), config.base)
    return source.load_model_config(config.base)


def resolve_tokens(config: RunConfig, architecture: PretrainedConfig) -> int:
    """The tokens of an example, as training resolves them. Raises `UserError` for more than the model has positions."""
    positions = source.max_positions(architecture)
    wanted = config.data.seq_len
    if wanted is None:
        return min(positions or DEFAULT_TOKENS, DEFAULT_TOKENS)
    if positions is not None and wanted > positions:
        rule = f"is more than the model's {positions} positions"
        raise UserError.of("--seq-len", wanted, rule, f"Give at most {positions}.")
    return wanted


def with_layers(architecture: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of `architecture` with so many layers; what it lists layer by layer is cut."""
    shallow = copy.deepcopy(architecture)
    depth = architecture.num_hidden_layers
    for name, value in list(vars(shallow).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(shallow, name, value[:layers])
    shallow.num_hidden_layers = layers
    return shallow


def _period(architecture: PretrainedConfig, whole: Any) -> int | None:
    """After how many layers the same kinds come again: 1 where all are equal; None where they never repeat whole.

    Layers that choose what they run (experts) count as never equal.
    """
    from qlora_kit.memory.watch import find_blocks

    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(architecture, name, None) for name in experts) or architecture.is_encoder_decoder:
        return None
    layers = architecture.num_hidden_layers
    kinds = getattr(architecture, "layer_types", None) or [""] * layers
    shapes = [tuple((name, p.shape) for name, p in block.named_parameters()) for block in find_blocks(whole)]
    each = list(zip(kinds, shapes, strict=False))
    whole_groups = (p for p in range(1, layers // DEEP + 1) if layers % p == 0 and layers > DEEP * p)
    return next((p for p in whole_groups if each == each[:p] * (layers // p)), None)


def _run(
    config: RunConfig, recipe: Recipe, architecture: PretrainedConfig, exact: bool, occasions: tuple[Occasion, ...]
) -> tuple[Record, list[Peak], bool]:
    """The record and the peaks of the run, and whether every layer was simulated."""
    own_blocks = config.adapter.differs_by_block and not config.base.full
    period = None
    if not (exact or own_blocks):
        whole = unquantized.foresee(config, architecture)
        period = _period(architecture, whole)
        unquantized.check(config, whole)  # here it has all its layers
    if period is not None:
        try:
            return *_run_shallow(config, recipe, architecture, period, occasions), False
        except NotEvenError:
            pass
    return *_run_whole(config, recipe, architecture, occasions), True


def _run_whole(
    config: RunConfig, recipe: Recipe, architecture: PretrainedConfig, occasions: tuple[Occasion, ...]
) -> tuple[Record, list[Peak]]:
    record = simulate(config, recipe, copy.deepcopy(architecture), afterwards=[each.run for each in occasions])
    return record, list(peaks_by_region(record.events).values())


def _run_shallow(
    config: RunConfig, recipe: Recipe, architecture: PretrainedConfig, period: int, occasions: tuple[Occasion, ...]
) -> tuple[Record, list[Peak]]:
    """The peaks at full depth from two shallow runs; likewise the numbers of the record, whose events stay shallow."""
    results, layers = MetaResults(), architecture.num_hidden_layers
    shallow, deep = (
        simulate(
            config,
            dataclasses.replace(recipe, depth=layers / (n * period)),
            with_layers(architecture, n * period),
            first_step=False,
            results=results,
            afterwards=[each.run for each in occasions],
        )
        for n in (SHALLOW, DEEP)
    )
    peaks = extrapolate(peaks_by_region(shallow.events), peaks_by_region(deep.events), layers, period)
    more = layers // period - DEEP
    grown = {
        name: getattr(deep, name) + more * (getattr(deep, name) - getattr(shallow, name))
        for name in ("paged_bytes", "host_bytes", "n_parameters", "n_trainable")
    }
    return dataclasses.replace(deep, **grown), peaks


def _plan_of(
    config: RunConfig,
    recipe: Recipe,
    architecture: PretrainedConfig,
    record: Record,
    peaks: list[Peak],
    exact: bool,
    gpu: rules.Gpu | None,
    occasions: tuple[Occasion, ...],
    unplanned: str,
    room_bytes: int,
) -> MemoryPlan:
    library_bytes = 2 * rules.cublas_workspace_bytes(recipe.capability)
    whole = [_point(peak, library_bytes) for peak in peaks]
    points = [point for point in whole if point.step <= STEPS]
    highest = max(points, key=lambda point: point.live_bytes)
    step = _stage(highest, f"{config.optim.batch_size} x {recipe.seq_len} tokens")
    occasional = list(_occasional(occasions, whole))
    loading = next(point for point in points if point.phase == "load")
    components = loading_components(loading.components, record.quantizing_bytes, not config.base.full)
    load = Stage(sum(components.values()), "the base, and factors on it", "", components)
    beside, answers = stages.besides_step(occasional, max(step.peak_bytes, room_bytes))
    found = {LOADING: load, **beside, STEP: step}
    largest_bytes = max(stage.peak_bytes for stage in found.values())
    return MemoryPlan(
        peak_bytes=highest.live_bytes,
        phase=highest.phase,
        block=highest.block,
        operation=highest.operation,
        components=highest.components,
        extras=rules.extras(largest_bytes, record.paged_bytes, record.host_bytes, recipe.capability),
        host_bytes=record.host_bytes,
        phases=_by_phase(points),
        series=tuple(point for point in points if point.step == max(p.step for p in points)),
        n_parameters=record.n_parameters,
        n_trainable=record.n_trainable,
        layers=architecture.num_hidden_layers,
        exact=exact,
        batch_size=config.optim.batch_size,
        seq_len=recipe.seq_len,
        optim=recipe.optim,
        attention=record.attention,
        passes=passes_of(config.optim),
        gpu=None if gpu is None else gpu.name,
        stages=found,
        answers=answers,
        unplanned=unplanned,
    )


def _occasional(occasions: Iterable[Occasion], points: Iterable[Point]) -> Iterator[tuple[Occasion, Stage]]:
    """The highest moment of each occasion; they follow the steps."""
    begin = STEPS + 1
    for occasion in occasions:
        own = (point for point in points if begin <= point.step < begin + occasion.passes)
        yield occasion, _stage(max(own, key=lambda point: point.live_bytes), str(occasion))
        begin += occasion.passes


def _stage(point: Point, what: str) -> Stage:
    return Stage(point.live_bytes, what, point.operation, point.components)


def _point(peak: Peak, library_bytes: int) -> Point:
    """A peak with the libraries' workspaces, which stay from the first matrix product on."""
    region = peak.region
    added = 0 if region.phase == "load" else library_bytes
    components = {name: peak.components.get(name, 0) for name in CATEGORIES}
    components["workspaces"] += added
    return Point(
        region.step, region.phase, region.block, region.recomputes, peak.n_bytes + added, peak.operation, components
    )


def _by_phase(points: Iterable[Point]) -> dict[str, Point]:
    best: dict[str, Point] = {}
    for point in points:
        if point.phase not in best or point.live_bytes > best[point.phase].live_bytes:
            best[point.phase] = point
    return best
