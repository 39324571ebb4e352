"""What a profile on CUDA uses: the allocator's own record of every allocation, told apart by where the step was.

While the steps run, only times are noted (of phases, and of tensors whose kind is known); afterwards the record is
played back into the same events that the planner's tracker writes. So a profile has the plan's components, and sees
what no dispatcher sees: the buffers of kernels and the workspaces of libraries. Not yet validated on hardware.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_kit.memory import rules
from qlora_kit.memory.profile.cpu import is_boring, short_line
from qlora_kit.memory.track import BORN_AS, CUDA_BLOCK_BYTES, Event, MemoryTracker, Region, Storage

_FREED = ("free_requested", "free")  # torch counts a block as free when it is asked to free it


class Counter(NamedTuple):
    """The allocator's highest counts in a phase, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something known at a time (µs since 1970): the region that begins, or the kind of the tensor at an address."""

    time_us: float
    region: Region | None = None
    address: int = 0
    category: str = ""


@dataclass(frozen=True)
class Playback:
    """The events of a record, and by the identity of their storages the lines that made them."""

    events: list[Event]
    lines: dict[int, str] = field(default_factory=dict)


class CudaTracker(MemoryTracker):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Takes notes for the allocator's record; it is never entered as a dispatch mode, so that the step runs as it is.

    At each change of phase it reads and resets the allocator's peaks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__("cuda")
        self.device = device
        self.notes: list[Note] = []
        self.counters: dict[str, Counter] = {}
        self.load_peak_bytes = 0
        self._blocks: list[dict[str, Any]] = []

    def start(self) -> None:
        """Begin recording; keeps the peak that loading had reached."""
        self.load_peak_bytes = torch.cuda.max_memory_allocated(self.device)
        memory: Any = torch.cuda.memory
        memory._record_memory_history(enabled="all", context="alloc", stacks="python", clear_history=True)
        self._blocks = [
            block
            for segment in memory._snapshot(self.device)["segments"]
            if segment["device"] == torch.cuda.current_device()
            for block in blocks_of(segment)
        ]
        torch.cuda.reset_peak_memory_stats(self.device)

    def finish(self, snapshot: Path | None = None) -> Playback:
        """Stop recording and play the record back; `snapshot` is where the file for PyTorch's viewer goes."""
        self._read_counters()
        memory: Any = torch.cuda.memory
        record = memory._snapshot(self.device)
        if snapshot is not None:
            memory._dump_snapshot(str(snapshot))
        memory._record_memory_history(enabled=None)
        capability = torch.cuda.get_device_capability(self.device)
        trace = record["device_traces"][torch.cuda.current_device()]
        return play_back(self._blocks, trace, self.notes, rules.cublas_workspace_bytes(capability))

    def abandon(self) -> None:
        """Stop recording and keep nothing."""
        torch.cuda.memory._record_memory_history(enabled=None)

    def enter(self, phase: str, block: int | None = None) -> None:
        """Note when the part of the step begins."""
        if phase != self.region.phase:
            self._read_counters()
        super().enter(phase, block)
        self.notes.append(Note(time_us=_now_us(), region=self.region))

    def begin_step(self) -> None:
        """Note when the next optimizer step begins."""
        self._read_counters()
        super().begin_step()
        self.notes.append(Note(time_us=_now_us(), region=self.region))

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Note what is at the address of `tensor`."""
        if tensor.device.type == "cuda":
            address = tensor.untyped_storage().data_ptr()
            self.notes.append(Note(time_us=_now_us(), address=address, category=category))

    def _read_counters(self) -> None:
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        if stats and self.region.step:
            here = Counter(stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"])
            before = self.counters.get(self.region.phase, here)
            self.counters[self.region.phase] = Counter(*map(max, here, before))
        torch.cuda.reset_peak_memory_stats(self.device)


def _now_us() -> float:
    return time.time_ns() / 1000


def blocks_of(segment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The blocks of a segment that are in use, each with its address (older torch leaves it to be counted)."""
    address = segment["address"]
    for block in segment["blocks"]:
        if block["state"] == "active_allocated":
            yield {**block, "address": block.get("address", address)}
        address += block["size"]


def play_back(
    blocks: Iterable[Mapping[str, Any]],
    trace: Iterable[Mapping[str, Any]],
    notes: Sequence[Note],
    library_bytes: int,
) -> Playback:
    """The events of an allocator's record: `blocks` lived before it began, `trace` is what happened then.

    `library_bytes` is the size of cuBLAS's workspace, which is known by that and by never dying.
    """
    player = _Player()
    for block in blocks:
        player.allocate(block["address"], block["size"], [])
    moments: list[tuple[float, int, Any]] = [(n.time_us, 0 if n.region else 2, n) for n in notes]
    moments += [(entry["time_us"], 1, entry) for entry in trace if entry["action"] in ("alloc", *_FREED)]
    for _, _, moment in sorted(moments, key=lambda m: m[:2]):  # stable: equal times stay in their order
        if isinstance(moment, Note):
            player.take(moment)
        elif moment["action"] == "alloc":
            player.allocate(moment["addr"], moment["size"], moment.get("frames", []))
        else:
            player.free(moment["addr"])
    player.name_workspaces(library_bytes)
    return Playback(player.events, player.lines)


class _Player:
    """What lives while a record is played back."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lines: dict[int, str] = {}
        self.live: dict[int, Storage] = {}
        self.named: set[int] = set()  # identities of storages whose kind was noted
        self.region = Region(step=0, phase="load")

    def take(self, note: Note) -> None:
        if note.region is not None:
            self.region = note.region
            return
        storage = self.live.get(note.address)
        if storage is not None:
            storage.category = note.category
            self.named.add(id(storage))

    def allocate(self, address: int, n_bytes: int, frames: Sequence[Mapping[str, Any]]) -> None:
        self.free(address)  # a record that begins late may miss one
        if self.region.phase == "backward":
            self.region = self.region_of_backward(frames)
        rounded = -(-n_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        storage = Storage(rounded, _category(self.region, frames), frames[0]["name"] if frames else "")
        self.live[address] = storage
        self.lines[id(storage)] = _line(frames)
        self.events.append(Event(rounded, storage, self.region))

    def region_of_backward(self, frames: Sequence[Mapping[str, Any]]) -> Region:
        """The same region, and whether a block is recomputed in it: then torch's checkpointing is on the stack."""
        recomputes = any("torch/utils/checkpoint" in frame["filename"].replace("\\", "/") for frame in frames)
        return Region(step=self.region.step, phase=self.region.phase, block=self.region.block, recomputes=recomputes)

    def free(self, address: int) -> None:
        storage = self.live.pop(address, None)
        if storage is not None:
            self.events.append(Event(-storage.n_bytes, storage, self.region))

    def name_workspaces(self, library_bytes: int) -> None:
        for storage in self.live.values():
            if storage.n_bytes == library_bytes and id(storage) not in self.named:
                storage.category = "workspaces"


def _category(region: Region, frames: Sequence[Mapping[str, Any]]) -> str:
    """The kind of an allocation that nothing names: by where in the step it was made, and by which function."""
    if any("dequantize" in frame["name"] for frame in frames[:3]):
        return "workspaces"
    return "recomputed block" if region.recomputes else BORN_AS[region.phase]


def _line(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost line that is in no library of tensors; none where autograd's own thread made the tensor."""
    for frame in frames:
        if not is_boring(frame["filename"]):
            return short_line(frame["filename"], frame["line"], frame["name"])
    return ""
