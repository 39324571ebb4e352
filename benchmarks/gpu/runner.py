"""Runs phases, each in a process of its own, so that whatever hangs or dies costs no more than its own result.

A phase prints its rows as lines of JSON on its standard output; each is in the journal as soon as it is printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gpu.journal import DONE, Journal

POLL_S = 0.2
KEPT_LINES = 40  # of what a phase says beside its rows
GRACE_S = 2.0  # for the last lines of a process that was ended


@dataclass(frozen=True)
class Phase:
    """What is run: a command, the seconds that it is thought to take and those that it may take at most.

    Phases that stand next to each other with `together` run at once; the others run alone, for they are timed.
    """

    name: str
    teaches: str
    command: tuple[str, ...]
    estimate_s: float
    limit_s: float
    together: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Process:
    """A phase at work in a session of its own."""

    def __init__(self, phase: Phase, journal: Journal, scratch: Path, limit_s: float) -> None:
        self.phase, self.journal, self.limit_s = phase, journal, limit_s
        scratch.mkdir(parents=True, exist_ok=True)
        self.said: deque[str] = deque(maxlen=KEPT_LINES)
        self.began_s, self.late = time.monotonic(), False
        self.process = subprocess.Popen(
            phase.command,
            cwd=scratch,
            env={**os.environ, **phase.environment, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
            if stream is not None
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                row = _row_of(line)
                if row is None:
                    self.said.append(line.rstrip()[:400])
                else:
                    self.journal.row(self.phase.name, row)

    @property
    def seconds(self) -> float:
        """How long it has been at work."""
        return time.monotonic() - self.began_s

    def end_if_late(self) -> None:
        """Kill it where its time is over."""
        if self.seconds >= self.limit_s and self.process.poll() is None:
            self.late = True
            self.kill()

    def ended(self) -> bool:
        """Whether it is over, by itself or because its time was; then its end is in the journal."""
        if not self.late and self.process.poll() is None:
            return False
        self.kill()  # what it started goes with it, also where it is over itself
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.said.append("could not be ended: it waits for the system")
        for reader in self.readers:
            reader.join(GRACE_S)
        said = "\n".join(self.said)
        code = None if self.late else self.process.returncode
        self.journal.end(self.phase.name, _status(code, self.limit_s), self.seconds, said)
        return True

    def kill(self) -> None:
        """End the whole session at once."""
        for pid in {self.process.pid, *descendants(self.process.pid)}:
            for end in (os.killpg, os.kill):
                try:
                    end(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue  # over already, or no leader of a group


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that these started, as far as the system can tell."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # over in the meantime
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, new = [], parents.get(pid, [])
    while new:
        found += new
        new = [child for parent in new for child in parents.get(parent, [])]
    return found


def _row_of(line: str) -> dict[str, object] | None:
    if not line.startswith("{"):
        return None
    try:
        row: dict[str, object] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row


def _status(code: int | None, limit_s: float) -> str:
    if code is None:
        return f"ended at its limit of {limit_s:.0f} s"
    if code == 0:
        return DONE
    return f"failed: signal {-code}" if code < 0 else f"failed: exit code {code}"


def groups(phases: Sequence[Phase]) -> list[list[Phase]]:
    """The phases in their order, those that run at once in one list."""
    found: list[list[Phase]] = []
    for phase in phases:
        if found and phase.together and found[-1][-1].together:
            found[-1].append(phase)
        else:
            found.append([phase])
    return found


def run_phases(
    phases: Sequence[Phase], journal: Journal, scratch: Path, end_s: float, say: Callable[[str], None] = print
) -> None:
    """Run `phases` until `time.monotonic()` is `end_s`; one that would not be done by then is not begun, and that said.

    Whatever hangs: this returns within a few seconds after `end_s`.
    """
    for group in groups(phases):
        left_s = end_s - time.monotonic()
        begun = []
        for phase in group:
            if phase.estimate_s > left_s:
                journal.end(phase.name, f"not begun: {max(left_s, 0):.0f} s were left", 0.0)
                say(f"{phase.name}: not begun, {max(left_s, 0):.0f} s are left and it takes {phase.estimate_s:.0f}")
                continue
            say(f"{phase.name}: {phase.teaches} (about {phase.estimate_s:.0f} s)")
            begun.append(Process(phase, journal, scratch / phase.name, min(phase.limit_s, left_s)))
        while begun:
            time.sleep(POLL_S)
            for process in begun:  # all of them, before any is waited for
                process.end_if_late()
            over = [process for process in begun if process.ended()]
            for process in over:
                say(f"{process.phase.name}: over after {process.seconds:.0f} s")
            begun = [process for process in begun if process not in over]
