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
from qlora_kit.runs.folder import (
    RunFolder,
    append_metrics,
    check_place,
    complete_checkpoints,
    continue_run,
    find_resume_point,
)
from qlora_kit.system.files import disk_errors, require_space, versions, write_json, write_text

RECORD = {"settings": {}, "base_hash": "sha256:0"}  # what a run's record is known by


def killed(folder: RunFolder) -> RunFolder:
    """The process of the run is gone, and what it held with it."""
    folder.release()
    return folder


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
    write_json(tmp_path / "x" / "run.json", RECORD)
    with pytest.raises(UserError, match="already exists"):
        RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    killed(RunFolder.create(str(tmp_path / "y"), "", overwrite=False))
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
        with pytest.raises(UserError, match="out = "):
            RunFolder.create(str(tmp_path / name) if name not in "./.." else name, "", overwrite=overwrite)
    assert names(tmp_path) == {"x", "file"}
    assert (tmp_path / "x" / "thesis.txt").read_text() == "precious"


def test_an_unfinished_run_is_offered_for_resuming_only_if_it_can_be(tmp_path):
    folder = killed(RunFolder.create(str(tmp_path / "x"), "", overwrite=False))
    with pytest.raises(UserError) as caught:
        folder.check_place(overwrite=False)
    assert "resume" not in str(caught.value)
    checkpoint(folder, 1)
    with pytest.raises(UserError, match="resume="):
        folder.check_place(overwrite=False)


def test_an_interrupted_replacement_is_what_is_resumed(tmp_path):
    done = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    checkpoint(done, 9)
    write_json(done.working / "run.json", RECORD)
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
    killed(folder)
    continue_run(find_resume_point(str(tmp_path / "x")), None, "", overwrite=False)
    lines = (folder.working / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["sample"] for line in lines if line] == ["one\u2028two\u0085three"]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out = "):
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
    with pytest.raises(UserError, match="not complete"):
        find_resume_point(str(folder.checkpoints / "checkpoint-200"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_resume_point(str(tmp_path))


def test_an_unfinished_run_goes_on_in_its_own_folder(tmp_path):
    folder = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    for step in range(1, 8):
        append_metrics(folder, {"step": step})
    for step in (2, 4, 6):
        checkpoint(folder, step)
    checkpoint(folder, 7, whole=False)
    killed(folder)
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


# ------------------------------------------------------------------------------------------ what is not ours, and locks


def content(folder: Path) -> dict[str, bytes | str]:
    """Everything in `folder`: the bytes of files, where links lead, and folders."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else "")
        for path in found
    }


def test_a_run_is_not_called_as_an_unfinished_one_is(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.partial, which marks the folders of unfinished runs"):
        RunFolder.at(tmp_path / "x.partial").check_place(True)


FOREIGN = {
    "notes": {"thesis.txt": "precious"},
    "a record of another tool": {"run.json": '{"lr": 1}', "model.bin": "precious"},
    "no JSON": {"run.json": "precious"},
    "checkpoints of another tool": {"checkpoints/epoch1.pt": "precious"},
    "a lock of another tool": {".lock": "", "data.db": "precious"},
    "a run's files without a record": {"metrics.jsonl": "{}", "README.md": "precious"},
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("where", ["x", "x.partial"])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_no_run_has_made_is_never_removed(tmp_path, where, files, overwrite):
    for name, text in files.items():
        file = tmp_path / where / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    before = content(tmp_path)
    for act in (RunFolder.at(tmp_path / "x").check_place, lambda o: RunFolder.create(str(tmp_path / "x"), "", o)):
        with pytest.raises(UserError, match="never replaced"):
            act(overwrite)
    RunFolder.at(tmp_path / "x").remove_unfinished()
    assert content(tmp_path) == before


@pytest.mark.parametrize("where", ["x", "x.partial"])
@pytest.mark.parametrize("leads_to", ["run", "nowhere"])
def test_a_link_is_never_replaced(tmp_path, where, leads_to):
    run = RunFolder.create(str(tmp_path / "run"), "", overwrite=False)
    write_json(run.working / "run.json", RECORD)
    run.finish()
    (tmp_path / where).symlink_to(tmp_path / leads_to)
    before = content(tmp_path)
    with pytest.raises(UserError, match="never replaced"):
        RunFolder.create(str(tmp_path / "x"), "", overwrite=True)
    RunFolder.at(tmp_path / "x").remove_unfinished()
    assert content(tmp_path) == before


def test_a_file_in_the_place_of_the_working_folder_stays(tmp_path):
    (tmp_path / "x.partial").write_text("precious")
    with pytest.raises(UserError, match="is not a run's"):
        RunFolder.create(str(tmp_path / "x"), "", overwrite=True)
    assert (tmp_path / "x.partial").read_text() == "precious"


@pytest.mark.parametrize("left", ["at once", "a checkpoint", "before locks, at once", "before locks, a record"])
def test_a_half_made_run_of_ours_is_replaced_when_asked(tmp_path, left):
    folder = killed(RunFolder.create(str(tmp_path / "x"), "", overwrite=False))
    if left == "a checkpoint":
        checkpoint(folder, 5)
    if left.startswith("before"):
        (folder.working / ".qlora_kit.lock").unlink()
    if left.endswith("record"):
        write_json(folder.working / "run.json", RECORD)
        (folder.checkpoints / "old").mkdir()
    with pytest.raises(UserError, match="there is an unfinished run in"):
        RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    again = RunFolder.create(str(tmp_path / "x"), "", overwrite=True)
    assert names(again.working) == {".qlora_kit.lock", "checkpoints"}
    assert not names(again.checkpoints)
    again.finish()
    assert names(tmp_path) == {"x"}
    assert names(tmp_path / "x") == {"checkpoints"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_at_work_is_not_disturbed(tmp_path, overwrite):
    """Neither by a second run in its place, nor by one that would go on where it is."""
    first = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    append_metrics(first, {"step": 1})
    checkpoint(first, 1)
    before, point = content(tmp_path), find_resume_point(str(tmp_path / "x"))
    for act in (
        lambda: RunFolder.create(str(tmp_path / "x"), "", overwrite),
        lambda: check_place(None, str(tmp_path / "x"), overwrite),
        lambda: check_place(point, None, overwrite),
        lambda: continue_run(point, None, "", overwrite),
    ):
        with pytest.raises(UserError, match=r"another run is working in .*x\.partial"):
            act()
    RunFolder.at(tmp_path / "x").remove_unfinished()
    assert content(tmp_path) == before
    first.finish()
    assert names(tmp_path / "x") == {"checkpoints", "metrics.jsonl"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_came_into_the_final_place_meanwhile_stays(tmp_path, overwrite):
    run = RunFolder.create(str(tmp_path / "x"), "", overwrite)
    (run.working / "result").write_text("of the run")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="appeared while the run was going on; the complete run is in"):
        run.finish()
    assert (tmp_path / "x" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / "x.partial" / "result").read_text() == "of the run"


def test_a_run_that_came_meanwhile_is_replaced_only_when_asked(tmp_path):
    run = RunFolder.create(str(tmp_path / "x"), "", overwrite=False)
    (tmp_path / "x").mkdir()
    write_json(tmp_path / "x" / "run.json", RECORD)
    with pytest.raises(UserError, match="appeared while the run was going on"):
        run.finish()
    assert names(tmp_path / "x") == {"run.json"}
