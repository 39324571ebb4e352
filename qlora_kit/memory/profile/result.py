"""What a profile says: the dataclasses, and how they follow from the events of the steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora_kit.memory.plan import MemoryPoint
from qlora_kit.memory.profile.cuda import Counter
from qlora_kit.memory.track import CATEGORIES, Event, Peak, Storage, peaks_by_region

LARGEST = 15  # tensors that are listed
UNATTRIBUTED = "unattributed"  # what CUDA's counter has beyond the record: remainders of blocks that are not split


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """A storage alive at the peak: bytes, kind, the operation and the line of Python that made it ('' if unknown)."""

    n_bytes: int
    category: str
    operation: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the measured steps should have taken, in bytes, and how that was worked out."""

    peak_bytes: int
    components: dict[str, int]
    phases: dict[str, int]
    basis: str


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """The measured memory of the first steps of a run; all sizes are bytes.

    `components` has the plan's names and sums to `peak_bytes` exactly; on CUDA the part of the allocator's count
    that its record does not explain is called "unattributed". `phases` and `series` are those of `MemoryPlan`.
    `counters` has CUDA's highest (allocated, reserved) by phase, `load_peak_bytes` what loading took before. `basis`
    says what was counted, and `predicted.basis` what it is compared with. `rows` and `tokens` are the largest batch.
    """

    device: str
    basis: str
    steps: int
    rows: int
    tokens: int
    padded: bool
    peak_bytes: int
    phase: str
    block: int | None
    operation: str
    components: dict[str, int]
    phases: dict[str, MemoryPoint]
    series: tuple[MemoryPoint, ...]
    largest: tuple[LiveTensor, ...]
    counters: dict[str, Counter] = field(default_factory=dict)
    load_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    snapshot: str | None = None
    predicted: Prediction | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; None where nothing was predicted."""
        return None if self.predicted is None else self.predicted.peak_bytes / self.peak_bytes - 1

    def component_errors(self) -> dict[str, int]:
        """Predicted minus measured bytes of each component of the peak that either has."""
        if self.predicted is None:
            return {}
        theirs = self.predicted.components
        names = [*CATEGORIES, UNATTRIBUTED]
        either = [name for name in names if theirs.get(name) or self.components.get(name)]
        return {name: theirs.get(name, 0) - self.components.get(name, 0) for name in either}

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values, ready for JSON."""
        content = {**dataclasses.asdict(self), "error": self.error}
        return json.loads(json.dumps(content))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MemoryProfile:
        """The profile that `to_dict` wrote."""
        values = {f.name: content[f.name] for f in dataclasses.fields(cls)}
        predicted = values["predicted"]
        return cls(
            **{
                **values,
                "phases": {name: MemoryPoint(**point) for name, point in values["phases"].items()},
                "series": tuple(MemoryPoint(**point) for point in values["series"]),
                "largest": tuple(LiveTensor(**tensor) for tensor in values["largest"]),
                "counters": {name: Counter(*counter) for name, counter in values["counters"].items()},
                "predicted": None if predicted is None else Prediction(**predicted),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The events of some steps, with what else was noted; `lines` is by the identity of a storage."""

    events: list[Event]
    lines: Mapping[int, str] = field(default_factory=dict)
    counters: dict[str, Counter] = field(default_factory=dict)
    load_peak_bytes: int | None = None

    @cached_property
    def phases(self) -> dict[str, MemoryPoint]:
        """The highest point of each phase; on CUDA as the allocator counted it."""
        best: dict[str, MemoryPoint] = {}
        for point in self._points:
            if point.phase not in best or point.live_bytes > best[point.phase].live_bytes:
                best[point.phase] = point
        return {name: self._as_counted(point) for name, point in best.items()}

    @property
    def peak(self) -> MemoryPoint:
        """The highest point within the steps (an evaluation between two of them is not of the step)."""
        in_steps = [point for name, point in self.phases.items() if name not in ("load", "idle")]
        return max(in_steps, key=lambda point: point.live_bytes)

    @property
    def series(self) -> tuple[MemoryPoint, ...]:
        """A point for each part of the last step, in its order."""
        last = max(point.step for point in self._points)
        return tuple(point for point in self._points if point.step == last)

    def largest(self, count: int = LARGEST) -> tuple[LiveTensor, ...]:
        """The largest storages alive at the highest point of the record."""
        live = sorted(self._live_at_peak(), key=lambda storage: -storage.n_bytes)
        return tuple(
            LiveTensor(n_bytes=s.n_bytes, category=s.category, operation=s.operation, line=self.lines.get(id(s), ""))
            for s in live[:count]
        )

    @cached_property
    def _points(self) -> list[MemoryPoint]:
        return [_point(peak) for peak in peaks_by_region(self.events).values()]

    def _as_counted(self, point: MemoryPoint) -> MemoryPoint:
        counter = self.counters.get(point.phase)
        if counter is None or counter.allocated_bytes == point.live_bytes:
            return point
        rest = counter.allocated_bytes - point.live_bytes
        components = {**point.components, UNATTRIBUTED: rest}
        return dataclasses.replace(point, live_bytes=counter.allocated_bytes, components=components)

    def _live_at_peak(self) -> list[Storage]:
        highest, at, live_bytes = -1, -1, 0
        for index, event in enumerate(self.events):
            live_bytes += event.change_bytes
            if live_bytes > highest and event.region.phase not in ("load", "idle"):
                highest, at = live_bytes, index
        live: dict[int, Storage] = {}
        for event in self.events[: at + 1]:
            if event.change_bytes > 0:
                live[id(event.storage)] = event.storage
            else:
                live.pop(id(event.storage), None)
        return list(live.values())


def _point(peak: Peak) -> MemoryPoint:
    region, components = peak.region, {name: peak.components.get(name, 0) for name in CATEGORIES}
    return MemoryPoint(
        step=region.step,
        phase=region.phase,
        block=region.block,
        recomputes=region.recomputes,
        live_bytes=peak.n_bytes,
        operation=peak.operation,
        components=components,
    )
