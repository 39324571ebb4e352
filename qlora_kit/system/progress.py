"""The progress display of a run: a bar with loss, tokens/s and peak memory, or plain lines in a pipe."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qlora_kit.system import host_memory

if TYPE_CHECKING:
    import torch

LINE_EVERY_S = 10.0  # how often a plain line is printed without a terminal


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated by torch on CUDA, resident in this process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


LOADING, EVALUATION, GENERATING, STEP = "loading", "evaluation", "generation", "step"
INITIALIZING, OTHER = "initialization", "other"
PHASES = {  # of a run, in words
    LOADING: "loading",
    INITIALIZING: "fitting the factors to the data",
    EVALUATION: "evaluation",
    GENERATING: "answering prompts",
    STEP: "the training step",
    OTHER: "outside of its phases",
}


class PhasePeaks:
    """The highest memory of each phase of a run, in bytes; `peaks` has it by the phase's name.

    On CUDA the allocator's peak is reset with every phase (so after the run it is that of the last phase). The peak of
    a process on the host cannot be reset: there a phase has one only if it went above all earlier phases.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._phase = OTHER
        self.note()
        if device.type == "cuda":
            self.peaks.clear()  # of what ran before

    @property
    def highest_bytes(self) -> int:
        """The highest peak so far, of any phase."""
        return max([peak_bytes(self.device), *self.peaks.values()])

    @property
    def highest_phase(self) -> str:
        """The phase of the highest peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within, the phase is `phase`; afterwards it is the one before."""
        before = self._phase
        self.note()
        self._phase = phase
        try:
            yield
        finally:
            self.note()
            self._phase = before

    def take(self, phase: str, n_bytes: int) -> None:
        """Note a peak of `phase` that was measured elsewhere, where the allocator's peak was reset."""
        self.peaks[phase] = max(n_bytes, self.peaks.get(phase, 0))

    def note(self) -> None:
        """Note the phase's peak until now."""
        import torch

        here = peak_bytes(self.device)
        if self.device.type == "cuda":
            self.take(self._phase, here)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif here > max(self.peaks.values(), default=0):
            self.peaks[self._phase] = here


def free_bytes(device: torch.device) -> int:
    """The memory for new tensors: free on a GPU or held empty by torch, available on the host.

    1 GiB, which any host has, if that cannot be found out.
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = host_memory.available_bytes()
    return 2**30 if available is None else available


def human_bytes(count: float) -> str:
    """`count` bytes in MiB or GiB, with at least two digits that count."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.2f} MiB"


def say_line(console: Console, line: str) -> None:
    """Print `line` as it is: no markup, no colours guessed, no wrapping in a pipe."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def counted(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done: call what this gives with each number done. A bar, or lines in a pipe."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, last_s = 0, time.monotonic()

    def tick(count: int) -> None:
        nonlocal done, last_s
        done += count
        if time.monotonic() - last_s > LINE_EVERY_S:
            last_s = time.monotonic()
            say_line(console, f"{label}: {done}/{total}")

    yield tick


class TrainingProgress:
    """A progress bar over the optimizer steps of a run, on standard error."""

    def __init__(self, device: torch.device, console: Console, peaks: PhasePeaks | None = None) -> None:
        self.peaks = PhasePeaks(device) if peaks is None else peaks
        self.console = console
        self.bar: Progress | None = None
        self.last_line_s = 0.0
        self.text = ""

    def start(self, step: int, steps: int) -> None:
        """Begin at `step` of `steps`."""
        self.steps = steps
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=steps, completed=step)
            self.bar.start()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show the state after optimizer step `step`."""
        self.text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  peak {human_bytes(self.peaks.highest_bytes)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self.text)
        elif time.monotonic() - self.last_line_s > LINE_EVERY_S or step == self.steps:
            self.last_line_s = time.monotonic()
            self.say(f"step {step}/{self.steps}  {self.text}")

    def note(self, text: str) -> None:
        """Show for the moment what else is going on, where there is a bar."""
        if self.bar is not None:
            self.bar.update(self.task, description=text)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        say_line(self.console, line)

    def stop(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class BytesProgress:
    """A progress bar over the bytes of a file that is worked through, on standard error."""

    def __init__(self, what: str, total_bytes: int, console: Console) -> None:
        self.what, self.total_bytes, self.done_bytes = what, total_bytes, 0
        self.console = console
        self.last_line_s = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn(what),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=total_bytes)
            self.bar.start()

    def advance(self, name: str, n_bytes: int) -> None:
        """Say that `n_bytes` more are done, the last of them of `name`."""
        self.done_bytes += n_bytes
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done_bytes, description=name)
        elif time.monotonic() - self.last_line_s > LINE_EVERY_S:
            self.last_line_s = time.monotonic()
            say_line(self.console, f"{self.what}: {human_bytes(self.done_bytes)} of {human_bytes(self.total_bytes)}")

    def stop(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
