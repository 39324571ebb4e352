"""What the benchmarks share: where a result was measured, and how it is written."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from qlora_kit.runs import versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def commit() -> str:
    """The commit that is measured, with `+` where the working tree differs from it; 'unknown' outside git."""
    root = RESULTS.parents[1]
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def device_name() -> str:
    """The device that is measured."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def place_of(device: str) -> str:
    """What the device called `device` is in the name of a result's file: `cpu`, or a GPU's name in small letters."""
    return "cpu" if device.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with its commit, device and versions to the results folder; returns the file."""
    file = RESULTS / f"{name}_{place_of(device_name())}.json"
    RESULTS.mkdir(exist_ok=True)
    where = {"commit": commit(), "device": device_name(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    write_json(file, {**where, **result})
    return file
