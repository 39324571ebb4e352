"""A merge that is killed leaves either nothing at its place or a complete release."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from children import in_a_child
from families import save_tiny
from releases import QUIET, make_adapter, release

from qlora_kit.config.settings import BaseConfig
from qlora_kit.release import merge
from qlora_kit.release.request import MergeRequest

KILLS = 20
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", "llama")
    make_adapter(folder / "base", folder / "adapter")
    release(folder / "base", [(folder / "adapter", 1.0)], folder / "whole")  # and warm up, for the children to inherit
    return folder


def merge_to(made: Path, out: Path, overwrite: bool = False):
    return lambda: release(made / "base", [(made / "adapter", 1.0)], out, overwrite=overwrite)


def check(out: Path, whole: Path) -> bool:
    """Whether there is a release at `out`; if so, it must be all there."""
    if not out.exists():
        return False
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((out / "merge_report.json").read_text())["proof"]["tensors"]["changed"] == 14
    return True


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_random_moments(made, tmp_path, overwrite):
    out = tmp_path / "out"
    start_s = time.monotonic()
    os.waitpid(in_a_child(merge_to(made, tmp_path / "timed")), 0)
    duration_s = time.monotonic() - start_s
    assert check(tmp_path / "timed", made / "whole")
    shutil.rmtree(tmp_path / "timed")
    draw = random.Random(overwrite)
    for _ in range(KILLS // 2):
        if overwrite and not out.exists():
            shutil.copytree(made / "whole", out)
        child = in_a_child(merge_to(made, out, overwrite))
        time.sleep(draw.uniform(0, 1.1 * duration_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if check(out, made / "whole") and not overwrite:
            shutil.rmtree(out)
        assert {path.name.split(".old-")[0] for path in tmp_path.iterdir()} <= {"out", "out.merging", ".out"}
    release(made / "base", [(made / "adapter", 1.0)], out, overwrite=True)
    assert check(out, made / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what the killed ones left is gone


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in Linux's /proc")
def test_killed_while_others_prove_it_leaves_neither_a_release_nor_them(made, tmp_path):
    out = tmp_path / "out"

    def task():
        chosen = ((str(made / "adapter"), 1.0),)
        merge.merge(MergeRequest(base=BaseConfig(model=str(made / "base")), adapters=chosen, out=str(out)), QUIET)

    child = in_a_child(task)
    wait_until(lambda: len(processes_with(tmp_path)) == 2)
    assert (tmp_path / "out.merging" / "proof" / "job.json").is_file()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists()
    wait_until(lambda: not processes_with(tmp_path))
    assert not out.exists()


def processes_with(folder: Path) -> list[str]:
    """The commands of this machine's processes that name `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        found += [command] if str(folder) in command else []
    return found


def wait_until(holds) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("waited for two minutes")


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_of_its_end(made, tmp_path, overwrite, monkeypatch):
    """Before each time that it syncs, renames or removes: also between the renames of an old and a new release."""
    out = tmp_path / "out"
    met = []
    for number in range(1, 40):
        if overwrite and not out.exists():
            shutil.copytree(made / "whole", out)

        def task(number=number):
            count_down(number, monkeypatch)
            merge_to(made, out, overwrite)()

        _, status = os.waitpid(in_a_child(task), 0)
        met.append(check(out, made / "whole"))
        if not os.WIFSIGNALED(status):
            break
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
    assert 3 < number < 39
    assert met[-1]
    assert overwrite or not met[0]
    release(made / "base", [(made / "adapter", 1.0)], out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def count_down(number: int, monkeypatch) -> None:
    """Let this process die just before the `number`-th of the steps."""
    left = [number]

    def counted(original):
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return step

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(pathlib.Path, "rename", counted(pathlib.Path.rename))
