from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.errors import UserError
from qlora_kit.runs import (
    RunFolder,
    append_metrics,
    complete_checkpoints,
    continue_run,
    disk_errors,
    find_resume_point,
    require_space,
    versions,
    write_json,
    write_text,
)


def checkpoint(folder: RunFolder, step: int, whole: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"step": step}) if whole else '{"step": ')
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "other")
    assert json.loads(file.read_text()) == {"a": 1}
    assert names(tmp_path) == {"a.json"}


def test_a_run_appears_only_when_it_is_whole(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "name", overwrite=False)
    assert not folder.final.exists()
    (folder.working / "run.json").write_text("{}")
    folder.finish()
    assert names(tmp_path) == {"x"}
    assert names(tmp_path / "x") == {"run.json", "checkpoints"}


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(None, "gpt2", overwrite=False).final.name.startswith("gpt2-")


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    RunFolder.create(str(tmp_path / "y"), "", overwrite=False)
    with pytest.raises(UserError, match="unfinished run"):
        RunFolder.create(str(tmp_path / "y"), "", overwrite=False)
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=True)
    assert (tmp_path / "x" / "run.json").exists()  # until the new one is whole
    folder.finish()
    assert names(tmp_path / "x") == {"checkpoints"}
    assert names(tmp_path) == {"x", "y.partial"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_run_folder_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("x", "file", ".", "..", "/"):
        with pytest.raises(UserError, match="--out"):
            RunFolder.create(str(tmp_path / name) if name not in "./.." else name, "", overwrite=overwrite)
    assert names(tmp_path) == {"x", "file"}
    assert (tmp_path / "x" / "thesis.txt").read_text() == "precious"


def test_an_unfinished_run_is_offered_for_resuming_only_if_it_can_be(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    with pytest.raises(UserError) as caught:
        folder.check_place(overwrite=False)
    assert "--resume" not in str(caught.value)
    checkpoint(folder, 1)
    with pytest.raises(UserError, match="--resume"):
        folder.check_place(overwrite=False)


def test_an_interrupted_replacement_is_what_is_resumed(tmp_path):
    done = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    checkpoint(done, 9)
    write_json(done.working / "run.json", {})
    done.finish()
    again = RunFolder.create(str(tmp_path / "x"), "", overwrite=True)
    checkpoint(again, 3)
    assert find_resume_point(str(tmp_path / "x")).checkpoint.parent == again.checkpoints


def test_metrics_survive_odd_characters_and_a_line_that_was_cut(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    append_metrics(folder, {"step": 1, "sample": "one\u2028two\u0085three"})
    checkpoint(folder, 1)
    with (folder.working / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    continue_run(find_resume_point(str(tmp_path / "x")), None, "", overwrite=False)
    lines = (folder.working / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["sample"] for line in lines if line] == ["one\u2028two\u0085three"]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        RunFolder.create(str(tmp_path / "file" / "x"), "", overwrite=False)


def test_an_unfinished_run_is_kept_only_if_it_can_be_resumed(tmp_path):
    empty = RunFolder.create(str(tmp_path / "a"), "", overwrite=False)
    checkpoint(empty, 5, whole=False)
    assert empty.discard_if_empty()
    kept = RunFolder.create(str(tmp_path / "b"), "", overwrite=False)
    checkpoint(kept, 5)
    assert not kept.discard_if_empty()
    assert names(tmp_path) == {"b.partial"}


def test_resuming_finds_the_newest_whole_checkpoint(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    for step in (5, 10, 100):
        checkpoint(folder, step)
    checkpoint(folder, 200, whole=False)
    assert [p.name for p in complete_checkpoints(folder.working)] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    point = find_resume_point(str(tmp_path / "x"))
    assert (point.step, point.unfinished, point.run) == (100, True, folder.working)
    older = find_resume_point(str(folder.checkpoints / "checkpoint-5"))
    assert (older.step, older.unfinished) == (5, True)
    with pytest.raises(UserError, match="not whole"):
        find_resume_point(str(folder.checkpoints / "checkpoint-200"))
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_resume_point(str(tmp_path))


def test_an_unfinished_run_goes_on_in_its_own_folder(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    for step in range(1, 8):
        append_metrics(folder, {"step": step})
    for step in (2, 4, 6):
        checkpoint(folder, step)
    checkpoint(folder, 7, whole=False)
    continued = continue_run(find_resume_point(str(folder.checkpoints / "checkpoint-4")), None, "", overwrite=False)
    assert continued == folder
    assert names(folder.checkpoints) == {"checkpoint-2", "checkpoint-4"}
    steps = [json.loads(line)["step"] for line in (folder.working / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_finished_run_goes_on_in_a_new_folder(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    append_metrics(folder, {"step": 2})
    checkpoint(folder, 2)
    folder.finish()
    continued = continue_run(find_resume_point(str(tmp_path / "x")), str(tmp_path / "y"), "", overwrite=False)
    assert continued.final == tmp_path / "y"
    assert (continued.working / "metrics.jsonl").read_text() == '{"step": 2}\n'
    assert names(tmp_path / "x" / "checkpoints") == {"checkpoint-2"}


def test_too_little_space_is_found_before_the_run(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(UserError, match="free"):
        require_space(tmp_path, 2**62)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_clear_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let a test mount a disk")
    try:
        with pytest.raises(UserError, match="the disk is full"), disk_errors(disk):
            write_text(disk / "a", "x" * 10**6)
        assert names(disk) == set()
        with pytest.raises(UserError, match="the disk is full"), disk_errors(disk):
            save_file({"x": torch.zeros(10**6)}, disk / "a.safetensors")
        with pytest.raises(UserError, match="the disk is full"), disk_errors(disk):
            torch.save({"x": torch.zeros(10**6)}, disk / "a.pt")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_versions_name_what_a_result_depends_on():
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= set(versions())
