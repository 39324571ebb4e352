"""Two steps of training on `meta`: everything the real step does to memory, and none of its arithmetic.

Two, because the optimizer's states are born in the first.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.build import Built, build_model
from qlora_kit.config.settings import RunConfig
from qlora_kit.data.encode import IGNORED
from qlora_kit.lean import offload
from qlora_kit.memory import kernels, loading, rules
from qlora_kit.memory.autocast import MetaAutocast
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.track import Event, MemoryTracker
from qlora_kit.memory.watch import watch
from qlora_kit.model import device, quantize
from qlora_kit.optim.kind import PlannedDevice
from qlora_kit.optim.rank_penalty import add_gradients
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

META = torch.device("meta")
STEPS = 2
LOGITS = ("logits", "start_logits", "end_logits")  # what models call them
PACKED_EXAMPLE_TOKENS = 256  # of an example in a packed row, in a plan: an assumption

Autocast = Callable[[bool], AbstractContextManager[Any]]
Build = Callable[[RunConfig, torch.device, Any], Built]
Afterwards = Callable[[MemoryTracker, Any, RunConfig, "Autocast | None"], None]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate beside the run's settings.

    `optim` is the resolved optimizer; `autocast`: fp32 weights under autocast, as Trainer's `bf16=True` does (or, on a
    GPU without bf16, `fp16=True`, which our own 16-bit runs there have too); `capability` is
    that of the GPU; `depth`: how many times the simulated layers the planned model has.
    """

    seq_len: int
    optim: str
    autocast: bool = False
    capability: tuple[int, int] = rules.DEFAULT_CAPABILITY
    depth: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulation saw: every change of live bytes, states outside torch's allocator, and the model's size.

    `host_bytes`: the pinned memory of the host that checkpoints lie in. `quantizing_bytes`: see
    `loading.quantizing_bytes`.
    """

    events: list[Event]
    paged_bytes: int
    host_bytes: int
    n_parameters: int
    n_trainable: int
    attention: str
    quantizing_bytes: int


def simulate(
    config: RunConfig,
    simulation: Simulation,
    architecture: PretrainedConfig | None = None,
    *,
    first_step: bool = True,
    results: MetaResults | None = None,
    build: Build = build_model,
    afterwards: Sequence[Afterwards] = (),
) -> Simulated:
    """Build the model of `config` on `meta`, train it for two steps, and return what that did to memory.

    Without `first_step` only the optimizer runs in the first one: the states are born, and its forward and backward
    pass, which need less than the second's, are left out. `results` is shared between simulations to save time.
    `build` makes the model: the trainer's own, unless a benchmark compares it with another. What is done `afterwards`,
    with the tracker, the model and the autocast of the step, counts as steps that follow.
    Leaves nothing behind in the process. Raises `UserError` for a model that cannot be found or built.
    """
    results = results if results is not None else MetaResults()
    tracker = MemoryTracker("meta", stand_ins=kernels.stand_ins(), run=results.run)
    with nothing_left_behind(), device.planned_for(rules.has_bf16(simulation.capability)):
        built = build(config, META, architecture)
        built.model.train()
        planned = _planned_device(built, simulation)
        optimizer = built.plan_optimizer(config.optim, simulation.optim, planned)
        autocast = _autocast_of(config, simulation)
        with watch(tracker, built.model, optimizer), kernels.CudaChoices(simulation.capability), tracker:
            _take_steps(tracker, built, optimizer, config, simulation.seq_len, autocast, first_step)
            for act in afterwards:
                tracker.begin_step()
                act(tracker, built.model, config, autocast)
        tracker.stop()
        return _seen(tracker, built, planned, results)


def _planned_device(built: Built, simulation: Simulation) -> PlannedDevice:
    """A GPU, where a flat buffer is as much larger as the planned model is deeper."""
    return PlannedDevice(type="cuda", growth=simulation.depth if built.factors is not None else 1.0)


def _take_steps(
    tracker: MemoryTracker,
    built: Built,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    seq_len: int,
    autocast: Autocast | None,
    first_step: bool,
) -> None:
    for step in range(STEPS):
        tracker.begin_step()
        if step == 0 and not first_step:
            _bear_states(tracker, built, optimizer, config.optim.clip)
            continue
        batches = [make_batch(config, seq_len, built.model.config) for _ in range(config.optim.grad_accum)]
        run_step(tracker, built, optimizer, batches, config.optim.clip, autocast)
        del batches


def _seen(tracker: MemoryTracker, built: Built, planned: PlannedDevice, results: MetaResults) -> Simulated:
    count = quantize.count_parameters(built.model)
    return Simulated(
        events=tracker.events,
        paged_bytes=sum(t.nbytes for t in planned.paged),
        host_bytes=offload.host_bytes(built.outcomes),
        n_parameters=count.total,
        n_trainable=count.trainable,
        attention=str(getattr(built.model.config, "_attn_implementation", "")),
        quantizing_bytes=loading.quantizing_bytes(built.model, results),
    )


def run_step(
    tracker: MemoryTracker,
    built: Built,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, torch.Tensor]],
    clip: float,
    autocast: Autocast | None = None,
) -> None:
    """One optimizer step over `batches`, all on the device already, in the order of transformers' Trainer.

    `autocast(recomputes)` gives the context of a forward pass, and of a backward pass, which may recompute one.
    """
    n_items = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    for batch in batches:
        run = functools.partial(_forward_and_backward, built.model, batch, n_items, autocast)
        run() if built.adversary is None else built.adversary.step(run)
    if built.rank_penalty is not None:
        add_gradients(built.model, built.rank_penalty)
    _optimize(tracker, built, optimizer, clip)


def _forward_and_backward(model: Any, batch: dict[str, torch.Tensor], n_items: Any, autocast: Autocast | None) -> None:
    loss = _forward(model, batch, n_items, autocast)
    with nullcontext() if autocast is None else autocast(True):
        kernels.backward(loss)


def _bear_states(tracker: MemoryTracker, built: Built, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """The end of a step: gradients are there, and the optimizer runs."""
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            tracker.label(parameter.grad, "gradients")
    _optimize(tracker, built, optimizer, clip)


def _optimize(tracker: MemoryTracker, built: Built, optimizer: torch.optim.Optimizer, clip: float) -> None:
    tracker.enter("clip")
    built.clip(clip)
    optimizer.step()
    built.model.zero_grad(set_to_none=True)


def _forward(model: Any, batch: dict[str, torch.Tensor], n_items: Any, autocast: Autocast | None) -> torch.Tensor:
    """The loss of a batch; the logits die with this call, but for what autograd keeps."""
    if autocast is None:
        return model(**batch, num_items_in_batch=n_items).loss  # type: ignore[no-any-return]
    with autocast(False):
        outputs = model(**batch, num_items_in_batch=n_items)
    for name in LOGITS:
        if outputs.get(name) is not None:
            outputs[name] = outputs[name].float()  # accelerate gives a user fp32 outputs
    return outputs.loss  # type: ignore[no-any-return]


def _autocast_of(config: RunConfig, simulation: Simulation) -> Autocast | None:
    """The autocast that the Trainer runs the step under; None without."""
    in_fp16 = device.compute_dtype(config.base, META) == torch.float16
    if not simulation.autocast and not in_fp16:
        return None
    lower = torch.bfloat16 if rules.has_bf16(simulation.capability) else torch.float16
    return lambda recomputes: MetaAutocast(not recomputes, lower)


def make_batch(config: RunConfig, seq_len: int, model_config: Any, rows: int | None = None) -> dict[str, Any]:
    """A batch on `meta` of `rows`, by default as many as a step takes, with the shapes and dtypes of `data.Collator`'s.

    A packed row is full of examples of `PACKED_EXAMPLE_TOKENS`: flash attention's backward pass takes rows for each.
    """
    from qlora_kit.data import packed_mask_dtype, segment_tensors
    from qlora_kit.lean import varlen

    shape = (rows or config.optim.batch_size, seq_len)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=META)}
    batch["labels"] = _labels(config, shape, model_config)
    if not config.data.pack:
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64, device=META)
        if has_token_types(config, model_config):
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64, device=META)
        return batch
    batch["position_ids"] = torch.zeros(shape, dtype=torch.int64, device=META)
    if varlen.is_on(model_config):
        row = [PACKED_EXAMPLE_TOKENS] * (seq_len // PACKED_EXAMPLE_TOKENS)
        segments = segment_tensors([row] * shape[0], seq_len)
        return {**batch, **{name: t.to(META) if torch.is_tensor(t) else t for name, t in segments.items()}}
    mask_dtype = packed_mask_dtype(model_config, 0)
    return {**batch, "attention_mask": torch.zeros((shape[0], 1, seq_len, seq_len), dtype=mask_dtype, device=META)}


def _labels(config: RunConfig, shape: tuple[int, int], model_config: Any) -> torch.Tensor:
    task = registry.task_of(config.base, model_config).model
    several = task.has_new_head and bool(config.base.multi_label)
    size = task.label_shape(*shape, model_config.num_labels, several)
    dtype = torch.float32 if task.has_float_labels(several) else torch.int64
    return torch.zeros(size, dtype=dtype, device=META)


def has_token_types(config: RunConfig, model_config: Any) -> bool:
    """Whether the tokenizer of such a model says of which text of a pair each token is."""
    has_new_head = registry.task_of(config.base, model_config).model.has_new_head
    return has_new_head and (getattr(model_config, "type_vocab_size", None) or 0) > 1


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Keep the caller's random state, what bitsandbytes keeps for the whole process, and torch's autocast."""
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    tables = dict(functional.name2qmap)
    manager = GlobalOptimManager.get_instance()
    overrides = dict(manager.pid2config)
    collects = gc.isenabled()
    gc.disable()  # a collection takes longer than the step; what dies, dies by its count of references
    with torch.random.fork_rng(devices=[]), _no_autocast_on_meta():
        try:
            yield
        finally:
            if collects:
                gc.enable()
            functional.name2qmap.clear()
            functional.name2qmap.update(tables)
            manager.pid2config = overrides


@contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    """Meanwhile `torch.autocast("meta")` does nothing: torch refuses it, and PEFT's experts switch it off."""
    stock: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == "meta" else stock(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = stock  # type: ignore[misc]
