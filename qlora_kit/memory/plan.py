"""The plan: how much of a GPU's memory a run will take, when, and for what, before anything is loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.adapters import unquantized
from qlora_kit.config.settings import RunConfig
from qlora_kit.data.encode import resolve_seq_len
from qlora_kit.errors import Fault, UserError
from qlora_kit.memory import rules, stages
from qlora_kit.memory.extrapolate import DEEP, SHALLOW, NotEvenError, extrapolate
from qlora_kit.memory.loading import loading_components
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.simulate import STEPS, Simulated, Simulation, simulate
from qlora_kit.memory.stages import AnswerBatch, Occasion, Stage
from qlora_kit.memory.track import CATEGORIES, Peak, peaks_by_region
from qlora_kit.model import architectures, source
from qlora_kit.model.blocks import find_blocks
from qlora_kit.optim.adversarial import passes_of
from qlora_kit.optim.optimizers import resolve_optim
from qlora_kit.system.progress import LOADING, STEP
from qlora_kit.tasks import registry
from qlora_kit.tasks.decoding import NOTHING_HELD_OUT, HeldOut

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What an architecture's code raises if it needs values, or if an operator has no kernel on `meta`."""


class CannotPlanError(UserError):
    """The model does not run on `meta`; it may still train."""

    def __init__(self, model: str, reason: str) -> None:
        self.reason = reason
        rule = f"its memory cannot be planned ({reason})"
        remedy = "Measure a few steps with `qlora-kit profile`, or train without a plan."
        super().__init__([Fault("model", model, rule, remedy)])


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """The most live bytes in one part of the step; `components` sums to `live_bytes`."""

    step: int
    phase: str
    block: int | None
    recomputes: bool
    live_bytes: int
    operation: str
    components: dict[str, int]


@dataclass(frozen=True, kw_only=True)
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
    phases: dict[str, MemoryPoint]
    series: tuple[MemoryPoint, ...]
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
        """The phase of the run with the highest peak; the step if several are equal."""
        return max(self.stages, key=lambda name: (self.stages[name].peak_bytes, name == STEP))

    @property
    def largest(self) -> Stage:
        """The same phase itself."""
        return self.stages[self.largest_stage]

    @property
    def beside_bytes(self) -> int:
        """The memory on the GPU that torch does not count."""
        return sum(extra.n_bytes for extra in self.extras if extra.on_device)

    @property
    def device_bytes(self) -> int:
        """The free memory that the GPU needs: the largest peak of the run and what torch does not count."""
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

    Of a hub model only config.json is downloaded. Equal layers, or equal groups of layers, are simulated three and
    four deep and extrapolated, unless `exact`. `autocast` plans fp32 weights under autocast, as transformers' Trainer
    runs with `bf16=True` (a baseline: this toolkit does not train that way). `held_out` says what is evaluated and
    answered; by default what the settings suggest (see `stages.assumed`). Prompts are answered in batches that take
    no more than the step, or than `room_bytes` if that is more.
    Raises `UserError`, in particular `CannotPlanError` for a model that does not run on `meta`.
    """
    architecture = resolve_architecture(config)
    simulation = Simulation(
        seq_len=resolve_tokens(config, architecture),
        optim=resolve_optim(config, torch.device("cuda")),
        autocast=autocast,
        capability=rules.DEFAULT_CAPABILITY if gpu is None else gpu.capability,
    )
    if held_out is None:
        held_out = stages.assumed(config, simulation.seq_len) if config.data.holds_out else NOTHING_HELD_OUT
    task, positions = registry.task_of(config.base, architecture).model, source.max_positions(architecture)
    occasions = stages.occasions(config, held_out, simulation.seq_len, task, positions)
    with failures_named(config):
        try:
            found, unplanned = _run(config, simulation, architecture, exact, occasions), ""
        except MODEL_FAILURES as error:  # the step itself may run
            found, occasions, unplanned = (
                _run(config, simulation, architecture, exact, ()),
                (),
                source.first_line(error),
            )
    return _plan_of(config, simulation, architecture, *found, gpu, occasions, unplanned, room_bytes)


@contextmanager
def failures_named(config: RunConfig) -> Iterator[None]:
    """Turn what the model of `config` raises on `meta` into a `CannotPlanError`."""
    try:
        yield
    except MODEL_FAILURES as error:
        raise CannotPlanError(config.base.model, source.first_line(error)) from error


def resolve_architecture(config: RunConfig) -> PretrainedConfig:
    """The architecture to plan: of a known name without any download, else as `source.load_model_config` finds it."""
    model = config.base.model
    if model.lower() in architectures.ARCHITECTURES and not Path(model).exists():
        return source.with_labels(architectures.named_config(model), config.base)
    return source.load_model_config(config.base)


def resolve_tokens(config: RunConfig, architecture: PretrainedConfig) -> int:
    """The longest example in tokens, as in training. Raises `UserError` if it exceeds the model's positions."""
    return resolve_seq_len(config.data.seq_len, None, source.max_positions(architecture))


def with_layers(architecture: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of `architecture` with `layers` layers; lists with one entry a layer are cut."""
    shallow = copy.deepcopy(architecture)
    depth = architecture.num_hidden_layers
    for name, value in list(vars(shallow).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(shallow, name, value[:layers])
    shallow.num_hidden_layers = layers
    return shallow


def _period(architecture: PretrainedConfig, whole: Any) -> int | None:
    """After how many layers the kinds of layers repeat: 1 if all are equal; None if they do not repeat.

    Layers that choose what they run (experts) count as never equal.
    """
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
    config: RunConfig,
    simulation: Simulation,
    architecture: PretrainedConfig,
    exact: bool,
    occasions: tuple[Occasion, ...],
) -> tuple[Simulated, list[Peak], bool]:
    """The record and the peaks of the run, and whether every layer was simulated."""
    own_blocks = config.adapter.differs_by_block and not config.base.full
    period = None
    if not (exact or own_blocks):
        whole = unquantized.foresee(config, architecture)
        period = _period(architecture, whole)
        unquantized.check(config, whole)  # here it has all its layers
    if period is not None:
        try:
            return *_run_shallow(config, simulation, architecture, period, occasions), False
        except NotEvenError:
            pass
    return *_run_whole(config, simulation, architecture, occasions), True


def _run_whole(
    config: RunConfig, simulation: Simulation, architecture: PretrainedConfig, occasions: tuple[Occasion, ...]
) -> tuple[Simulated, list[Peak]]:
    record = simulate(config, simulation, copy.deepcopy(architecture), afterwards=[each.run for each in occasions])
    return record, list(peaks_by_region(record.events).values())


def _run_shallow(
    config: RunConfig,
    simulation: Simulation,
    architecture: PretrainedConfig,
    period: int,
    occasions: tuple[Occasion, ...],
) -> tuple[Simulated, list[Peak]]:
    """The peaks at full depth from two shallow runs; likewise the numbers of the record, whose events stay shallow."""
    results, layers = MetaResults(), architecture.num_hidden_layers
    shallow, deep = (
        simulate(
            config,
            dataclasses.replace(simulation, depth=layers / (n * period)),
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
    simulation: Simulation,
    architecture: PretrainedConfig,
    record: Simulated,
    peaks: list[Peak],
    exact: bool,
    gpu: rules.Gpu | None,
    occasions: tuple[Occasion, ...],
    unplanned: str,
    room_bytes: int,
) -> MemoryPlan:
    library_bytes = 2 * rules.cublas_workspace_bytes(simulation.capability)
    whole = [_point(peak, library_bytes) for peak in peaks]
    points = [point for point in whole if point.step <= STEPS]
    highest = max(points, key=lambda point: point.live_bytes)
    step = _stage(highest, f"{config.optim.batch_size} x {simulation.seq_len} tokens")
    occasional = list(_occasional(occasions, whole))
    loading = next(point for point in points if point.phase == "load")
    components = loading_components(loading.components, record.quantizing_bytes, not config.base.full)
    load = Stage(
        peak_bytes=sum(components.values()), what="the base, and factors on it", operation="", components=components
    )
    beside, answers = stages.besides_step(occasional, max(step.peak_bytes, room_bytes))
    found = {LOADING: load, **beside, STEP: step}
    largest_bytes = max(stage.peak_bytes for stage in found.values())
    return MemoryPlan(
        peak_bytes=highest.live_bytes,
        phase=highest.phase,
        block=highest.block,
        operation=highest.operation,
        components=highest.components,
        extras=rules.extras(largest_bytes, record.paged_bytes, record.host_bytes, simulation.capability),
        host_bytes=record.host_bytes,
        phases=_by_phase(points),
        series=tuple(point for point in points if point.step == max(p.step for p in points)),
        n_parameters=record.n_parameters,
        n_trainable=record.n_trainable,
        layers=architecture.num_hidden_layers,
        exact=exact,
        batch_size=config.optim.batch_size,
        seq_len=simulation.seq_len,
        optim=simulation.optim,
        attention=record.attention,
        passes=passes_of(config.optim),
        gpu=None if gpu is None else gpu.name,
        stages=found,
        answers=answers,
        unplanned=unplanned,
    )


def _occasional(occasions: Iterable[Occasion], points: Iterable[MemoryPoint]) -> Iterator[tuple[Occasion, Stage]]:
    """The highest moment of each occasion; they follow the steps."""
    begin = STEPS + 1
    for occasion in occasions:
        own = (point for point in points if begin <= point.step < begin + occasion.passes)
        yield occasion, _stage(max(own, key=lambda point: point.live_bytes), str(occasion))
        begin += occasion.passes


def _stage(point: MemoryPoint, what: str) -> Stage:
    return Stage(peak_bytes=point.live_bytes, what=what, operation=point.operation, components=point.components)


def _point(peak: Peak, library_bytes: int) -> MemoryPoint:
    """A peak with the libraries' workspaces, which stay from the first matrix product on."""
    region = peak.region
    added = 0 if region.phase == "load" else library_bytes
    components = {name: peak.components.get(name, 0) for name in CATEGORIES}
    components["workspaces"] += added
    return MemoryPoint(
        step=region.step,
        phase=region.phase,
        block=region.block,
        recomputes=region.recomputes,
        live_bytes=peak.n_bytes + added,
        operation=peak.operation,
        components=components,
    )


def _by_phase(points: Iterable[MemoryPoint]) -> dict[str, MemoryPoint]:
    best: dict[str, MemoryPoint] = {}
    for point in points:
        if point.phase not in best or point.live_bytes > best[point.phase].live_bytes:
            best[point.phase] = point
    return best
