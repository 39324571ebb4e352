"""No ordinary test can reach a GPU, on whatever machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import HIDES, shows_cuda

from qlora_kit.config.settings import BaseConfig
from qlora_kit.model.device import resolve_device


def test_what_is_left_to_the_machine_is_the_cpu():
    assert os.environ[HIDES] == ""
    assert not torch.cuda.is_available()
    assert resolve_device(BaseConfig().device) == torch.device("cpu")


def test_what_a_test_starts_sees_no_gpu_either():
    code = f"import os, torch; print(repr(os.environ[{HIDES!r}]), torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "'' False\n"


@pytest.mark.parametrize(
    ("markers", "shown"),
    [("gpu", True), ("gpu and not data", True), ("", False), ("not gpu", False), ("accuracy", False)],
)
def test_only_tests_marked_so_see_it(markers, shown):
    assert shows_cuda(markers) == shown


@pytest.mark.slow
def test_a_process_that_sees_it_runs_no_ordinary_test():
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu or not gpu",
        str(here),
        str(here.with_name("test_gpu.py")),
    ]
    shown = {name: value for name, value in os.environ.items() if name != HIDES}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here.parents[1], env=shown)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "tests/test_devices.py" in done.stderr
    assert "not marked gpu: give -m gpu" in done.stderr
