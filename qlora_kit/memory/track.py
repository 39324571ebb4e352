"""Follows every storage from birth to death: how many bytes are live, of what kind, in which part of the step.

The same tracker serves the planner (tensors on `meta`, which take no memory) and the profiler (real tensors). It
sees what goes through torch's dispatcher; buffers that a kernel allocates for itself stay invisible, and `kernels`
and `rules` say which of them count on CUDA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_BLOCK_BYTES = 512  # torch's CUDA allocator rounds every request up to a multiple of this
CATEGORIES = (
    "quantized weights",
    "quantization state",
    "weights",  # linear layers that are not quantized
    "embeddings and head",
    "norms and biases",
    "adapters",
    "gradients",
    "optimizer states",
    "checkpoints",  # what is kept between blocks for the recomputation
    "activations",
    "cache",  # of keys and values, while prompts are answered
    "recomputed block",
    "loss",  # logits and what follows the head
    "inputs",
    "workspaces",  # dequantized weights, the optimizer's temporaries, kernels' buffers
)
PHASES = ("load", "forward", "loss", "loss backward", "backward", "clip", "optimizer", "idle")
BORN_AS = {
    "load": "workspaces",
    "forward": "activations",
    "loss": "loss",
    "loss backward": "loss",
    "backward": "activations",
    "clip": "workspaces",
    "optimizer": "workspaces",
    "idle": "inputs",
}

StandIn = Callable[..., Any]  # runs in the place of an operator: (tracker, func, args, kwargs) -> its result


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the run: which optimizer step (0 is before the first), which phase of it, which block."""

    step: int
    phase: str
    block: int | None = None
    recomputes: bool = False

    def __str__(self) -> str:
        where = self.phase if self.block is None else f"{self.phase}, block {self.block}"
        return f"step {self.step}, {where}" if self.step else where


class Storage:
    """One storage: its size, its kind (settled at the latest when the run ends), and what made it."""

    __slots__ = ("category", "n_bytes", "operation", "reference")

    def __init__(self, n_bytes: int, category: str, operation: str) -> None:
        self.n_bytes = n_bytes
        self.category = category
        self.operation = operation
        self.reference: weakref.ref[Any] | None = None


@dataclass(frozen=True)
class Event:
    """A change of the live bytes."""

    change_bytes: int
    storage: Storage
    region: Region


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most bytes alive at one moment, where that was, and what they were; `components` sums to `n_bytes`."""

    n_bytes: int
    region: Region
    operation: str
    components: Mapping[str, int] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Counts the live bytes on devices of `device_type` while it is entered.

    `block_bytes` rounds every storage up (512 as on CUDA; 1 for the bytes as they are). `stand_ins` gives, for an
    operator, what runs in its place: it may allocate the temporaries that the real kernel would. `run` runs the others.
    """

    def __init__(
        self,
        device_type: str,
        block_bytes: int = CUDA_BLOCK_BYTES,
        stand_ins: Mapping[Any, StandIn] | None = None,
        run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run if run is not None else _run
        self.device_type = device_type
        self.block_bytes = block_bytes
        self.stand_ins = dict(stand_ins or {})
        self.region = Region(step=0, phase="load")
        self.events: list[Event] = []
        self.live_bytes = 0
        self.layers_running = 0  # layers of blocks whose forward pass is under way
        self._live: dict[int, Storage] = {}
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, or its stand-in, and follow the storages of its results."""
        if self.region.phase == "backward":
            self._notice_recomputation()
        stand_in = self.stand_ins.get(func)
        arguments = (func, args, kwargs or {})
        result = self.run(*arguments) if stand_in is None else stand_in(self, *arguments)
        if not self._paused:
            self.see(result, str(func))
        return result

    def enter(self, phase: str, block: int | None = None) -> None:
        """Begin a phase, or a block in it."""
        self.region = Region(step=self.region.step, phase=phase, block=block)

    def mark(self) -> None:
        """Note the live bytes now, so that this part of the step is recorded even if nothing changes in it."""
        self.events.append(Event(0, Storage(0, "workspaces", ""), self.region))

    def _notice_recomputation(self) -> None:
        """In the backward pass, gradients are on, or a layer runs, only where a block is recomputed."""
        recomputes = self.layers_running > 0 or torch.is_grad_enabled()
        if recomputes != self.region.recomputes:
            self.region = Region(
                step=self.region.step, phase="backward", block=self.region.block, recomputes=recomputes
            )

    def begin_step(self) -> None:
        """Begin the next optimizer step."""
        self.region = Region(step=self.region.step + 1, phase="idle")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, count nothing that is made: it is on another device."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Set the kind of the storage of `tensor`, from its birth on; an unknown storage is born now."""
        if tensor.device.type != self.device_type:
            return
        storage = self._live.get(tensor.untyped_storage()._cdata)
        if storage is None:
            self._follow(tensor.untyped_storage(), "", category)
        else:
            storage.category = category

    def category_of(self, tensor: torch.Tensor) -> str | None:
        """The kind of the storage of `tensor`; None where it is not followed."""
        storage = self._live.get(tensor.untyped_storage()._cdata)
        return None if storage is None else storage.category

    def stop(self) -> None:
        """Stop following; the counts stay."""
        self._live.clear()

    def see(self, result: Any, operation: str) -> None:
        """Follow the storages of what `operation` returned."""
        if isinstance(result, torch.Tensor):
            if result.device.type == self.device_type:
                self._follow(result.untyped_storage(), operation, None)
        elif isinstance(result, (tuple, list)):
            for part in result:
                self.see(part, operation)

    def _follow(self, untyped: torch.UntypedStorage, operation: str, category: str | None) -> None:
        n_bytes = -(-untyped.nbytes() // self.block_bytes) * self.block_bytes
        key = untyped._cdata
        known = self._live.get(key)
        if known is not None:
            if known.n_bytes != n_bytes:  # resized in place
                self._count(n_bytes - known.n_bytes, known)
                known.n_bytes = n_bytes
            return
        if category is None:
            category = "recomputed block" if self.region.recomputes else BORN_AS[self.region.phase]
        storage = Storage(n_bytes, category, operation)
        storage.reference = weakref.ref(untyped, lambda _: self._died(key, storage))
        self._live[key] = storage
        self._count(n_bytes, storage)

    def _died(self, key: int, storage: Storage) -> None:
        if self._live.get(key) is storage:
            del self._live[key]
            self._count(-storage.n_bytes, storage)

    def _count(self, change_bytes: int, storage: Storage) -> None:
        self.live_bytes += change_bytes
        self.events.append(Event(change_bytes, storage, self.region))


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def peaks_by_region(events: Iterable[Event]) -> dict[Region, Peak]:
    """For each region the moment with the most live bytes, in the order in which the regions were first entered."""
    best: dict[Region, tuple[int, int, str]] = {}  # bytes, index of the event, operation
    live_bytes = 0
    for index, event in enumerate(events := list(events)):
        before = live_bytes
        live_bytes += event.change_bytes
        peak = best.get(event.region)
        here = max(live_bytes, before) if peak is None else live_bytes  # a region may begin by freeing
        if peak is None or here > peak[0]:
            at = index if here == live_bytes else index - 1
            grows = at == index and event.change_bytes > 0
            best[event.region] = (here, at, event.storage.operation if grows else "")
    wanted = {index for _, index, _ in best.values()}
    composition = dict(_compositions(events, wanted))
    return {
        region: Peak(n_bytes=n_bytes, region=region, operation=operation, components=composition.get(index, {}))
        for region, (n_bytes, index, operation) in best.items()
    }


def _compositions(events: list[Event], wanted: set[int]) -> Iterator[tuple[int, dict[str, int]]]:
    live: dict[str, int] = {}
    for index, event in enumerate(events):
        category = event.storage.category
        live[category] = live.get(category, 0) + event.change_bytes
        if index in wanted:
            yield index, {name: n_bytes for name, n_bytes in live.items() if n_bytes}


def overall_peak(events: Iterable[Event]) -> Peak:
    """The moment with the most live bytes of all; zero bytes where there was no event."""
    peaks = peaks_by_region(events).values()
    return max(
        peaks, key=lambda peak: peak.n_bytes, default=Peak(n_bytes=0, region=Region(step=0, phase="load"), operation="")
    )
