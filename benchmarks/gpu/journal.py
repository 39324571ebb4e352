"""The journal of a run on a GPU: one file of JSON lines, each written as soon as it is known.

A line is a row that a phase found, or the end of a phase: `{"phase", "rehearsal", "where", "at"}` and either `row` or
`status` (`DONE`, or in words why not) with `seconds` and the `tail` of what the phase said.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DONE = "done"
FILE = "results.jsonl"
KEPT = "on_gpu_{place}.jsonl"  # the same lines where results are committed
MOST_BYTES = 12 << 20  # of a journal: what comes back from a lent machine has its limits
MOST_LINE_BYTES = 1 << 16


class Journal:
    """Appends to `folder`/results.jsonl; each line is on the disk before the next is looked at."""

    def __init__(self, folder: Path, where: Mapping[str, Any], rehearsal: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        self.common = {"rehearsal": rehearsal, "where": dict(where)}

    def row(self, phase: str, row: Mapping[str, Any]) -> None:
        """A row that `phase` found."""
        self._append({"phase": phase, "row": dict(row)})

    def end(self, phase: str, status: str, seconds: float, tail: str = "") -> None:
        """The end of `phase`, `DONE` or why not."""
        self._append({"phase": phase, "status": status, "seconds": round(seconds, 1), "tail": tail})

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps({**line, **self.common, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}) + "\n"
        if len(text) > MOST_LINE_BYTES:
            text = json.dumps({**line, "row": {"status": "left out: too long a row"}, **self.common}) + "\n"
        if self.file.exists() and self.file.stat().st_size + len(text) > MOST_BYTES:
            return  # a phase that floods does not take the space of the others' results on the way back
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


@dataclass
class Found:
    """What a phase found in one go: its rows, and how it ended."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    status: str = "broke off"  # until its end is read
    seconds: float = 0.0
    tail: str = ""
    where: dict[str, Any] = field(default_factory=dict)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was cut off is left out."""
    found = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the machine was gone while it was written
    return found


def by_phase(lines: Iterable[Mapping[str, Any]], rehearsal: bool = False) -> dict[str, Found]:
    """What each phase found: in its last go that was done, or without one in its last go."""
    goes: dict[str, list[Found]] = {}
    for line in lines:
        if line["rehearsal"] != rehearsal:
            continue
        of_phase = goes.setdefault(line["phase"], [])
        if not of_phase or of_phase[-1].seconds:
            of_phase.append(Found())
        go = of_phase[-1]
        go.where = line["where"]
        if "status" in line:
            go.status, go.seconds, go.tail = line["status"], max(line["seconds"], 0.1), line["tail"]
        else:
            go.rows.append(line["row"])
    return {phase: _best(found) for phase, found in goes.items()}


def _best(goes: list[Found]) -> Found:
    """A go that was done rather than another, one with rows rather than one without, a later rather than an earlier."""
    return max(enumerate(goes), key=lambda pair: (pair[1].status == DONE, bool(pair[1].rows), pair[0]))[1]


def held_lines(folder: Path, device: str | None = None) -> list[dict[str, Any]]:
    """The lines of the journals in `folder`, without rehearsals; of `device` alone where it is named."""
    files = [*sorted(folder.glob(KEPT.format(place="*"))), *folder.glob(FILE)]
    lines = [line for file in files for line in read_lines(file) if not line["rehearsal"]]
    return [line for line in lines if device in (None, line["where"]["device"])]


def held_in(folder: Path, device: str | None = None) -> dict[str, Found]:
    """What the journals in `folder` hold, of `device` alone where it is named."""
    return by_phase(held_lines(folder, device))


def devices_in(folder: Path) -> list[str]:
    """The devices that the journals in `folder` are of."""
    return sorted({line["where"]["device"] for line in held_lines(folder)})


def kept_lines(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines worth committing: of each phase those of its best go, rehearsals left out."""
    found = []
    for phase, go in by_phase(lines).items():
        common = {"rehearsal": False, "where": go.where}
        found += [{"phase": phase, "row": row, **common} for row in go.rows]
        found.append({"phase": phase, "status": go.status, "seconds": go.seconds, "tail": go.tail[-500:], **common})
    return found
