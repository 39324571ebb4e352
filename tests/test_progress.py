from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qlora_kit.progress import TrainingProgress, human_bytes, peak_bytes


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
