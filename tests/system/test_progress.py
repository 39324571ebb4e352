from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qlora_kit.system import progress
from qlora_kit.system.progress import PhasePeaks, TrainingProgress, human_bytes, peak_bytes


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_and_peak(terminal):
    file = io.StringIO()
    progress = TrainingProgress(torch.device("cpu"), Console(file=file, force_terminal=terminal, width=120))
    progress.start(0, 2)
    progress.update(1, 2.5, 1234.0)
    progress.say("held-out loss 2.4 [not markup]")
    progress.update(2, 2.25, 1234.0)
    progress.stop()
    shown = file.getvalue()
    for text in ("loss 2.2500", "1,234 tokens/s", "peak ", "2/2", "held-out loss 2.4 [not markup]"):
        assert text in shown


def test_the_peak_is_a_plausible_number_of_bytes():
    before = peak_bytes(torch.device("cpu"))
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes(torch.device("cpu")) >= before > kept.nbytes


def test_bytes_are_written_for_people():
    assert human_bytes(3 << 30) == "3.00 GiB"
    assert human_bytes(10 << 20) == "10 MiB"
    assert human_bytes(3.51 * 2**20) == "3.51 MiB"  # not 4


class Counter:
    """Stands for torch's allocator: what lives, and the peak since it was begun anew."""

    def __init__(self, monkeypatch, device_type):
        self.live = self.peak = 50
        monkeypatch.setattr(progress, "peak_bytes", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        self.peaks = PhasePeaks(torch.device(device_type))

    def reset(self, device=None):
        self.peak = self.live

    def reach(self, n_bytes):
        self.peak = max(self.peak, n_bytes)


def play(counter):
    """A run: loading, answers before it, steps with an evaluation between them that shows an answer."""
    with counter.peaks.during("loading"):
        counter.reach(400)
        counter.live = 300
    with counter.peaks.during("generation"):
        counter.reach(700)
    with counter.peaks.during("step"):
        counter.reach(500)
        with counter.peaks.during("evaluation"):
            counter.reach(450)
        with counter.peaks.during("generation"):
            counter.reach(350)
        counter.reach(600)
    counter.peaks.note()
    return counter.peaks


def test_every_phase_has_its_own_peak_on_cuda(monkeypatch):
    peaks = play(Counter(monkeypatch, "cuda"))
    assert peaks.peaks == {"loading": 400, "generation": 700, "step": 600, "evaluation": 450, "other": 300}
    assert (peaks.highest_bytes, peaks.highest_phase) == (700, "generation")
    peaks.take("step", 900)  # of a profile
    peaks.take("step", 800)
    assert (peaks.highest_bytes, peaks.highest_phase) == (900, "step")


def test_before_any_phase_is_over_the_highest_is_what_is_allocated(monkeypatch):
    """A profile asks at its first step; on CUDA nothing is noted by then."""
    counter = Counter(monkeypatch, "cuda")
    counter.reach(70)
    assert counter.peaks.highest_bytes == 70


def test_on_the_host_a_phase_has_one_where_it_went_above_all_before_it(monkeypatch):
    peaks = play(Counter(monkeypatch, "cpu"))
    assert peaks.peaks == {"other": 50, "loading": 400, "generation": 700}
    assert (peaks.highest_bytes, peaks.highest_phase) == (700, "generation")


def test_a_phase_that_fails_is_noted_too(monkeypatch):
    counter = Counter(monkeypatch, "cuda")

    def fail():
        with counter.peaks.during("loading"):
            counter.reach(99)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert counter.peaks.peaks["loading"] == 99
