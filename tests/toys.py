"""Copies of the package to which a test adds a part of its own, and runs of them from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import qlora_kit

DEADLINE_S = 600
RUN = (
    "--schedule",
    "constant",
    "--save-steps",
    "2",
    "--no-keep-best",
    "--seq-len",
    "64",
    "--r",
    "4",
    "--device",
    "cpu",
)


class Copy:
    """The package as it is, in a folder where a test may add to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "qlora_kit"
        own = Path(qlora_kit.__file__).parent
        shutil.copytree(own, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def add_file(self, name: str, text: str) -> None:
        """A new file of the package."""
        file = self.package / name
        assert not file.exists()
        file.write_text(text, encoding="utf-8")

    def add_line(self, name: str, line: str, before: str) -> None:
        """One line in a file of the package, above the one that begins with `before`."""
        file = self.package / name
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        place = next(i for i, there in enumerate(lines) if there.strip().startswith(before))
        lines.insert(place, line + "\n")
        file.write_text("".join(lines), encoding="utf-8")

    def run(self, *args: str) -> str:
        """What a command prints."""
        done = subprocess.run(self._command(args), capture_output=True, text=True, timeout=DEADLINE_S, **self._where())
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def train(self, out: Path, *args: str) -> str:
        """Train on the demo into `out`."""
        return self.run("train", "--no-preflight", *RUN, "--out", str(out), *args)

    def train_and_kill(self, out: Path, *args: str) -> Path:
        """The same, ended when the checkpoint of step 2 is there, which it gives."""
        command = self._command(["train", "--no-preflight", *RUN, "--out", str(out), *args])
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **self._where())
        checkpoint = Path(f"{out}.partial") / "checkpoints" / "checkpoint-2"
        deadline_s = time.monotonic() + DEADLINE_S
        while not _is_whole(checkpoint / "trainer_state.json"):
            assert time.monotonic() < deadline_s
            assert process.poll() is None, "it must not end before it is killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return checkpoint

    def _command(self, args: list[str] | tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "qlora_kit", *args]

    def _where(self) -> dict[str, object]:
        path = {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return {"env": {**os.environ, **path}, "cwd": self.root}


def _is_whole(file: Path) -> bool:
    """Whether the state that a checkpoint ends with is there, and written to its end."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
