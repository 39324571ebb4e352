"""Where a release is put: what belongs to somebody else is never touched, whenever it appears."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from qlora_kit import UserError
from qlora_kit.release.files.folder import REPORT_FILE, Place
from qlora_kit.system.locks import LOCK_FILE


def finished(working: Path) -> Path:
    """A release that was made in the folder to work in."""
    whole = working / "trained"
    whole.mkdir()
    (whole / REPORT_FILE).write_text("new")
    return whole


def old_release(folder: Path) -> Path:
    folder.mkdir()
    (folder / REPORT_FILE).write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def put(out: Path, overwrite: bool = False, meanwhile=lambda: None) -> None:
    place = Place.at(str(out))
    place.check(overwrite)
    with place.made() as working:
        meanwhile()
        place.put(finished(working), overwrite)


def test_a_release_takes_its_place(tmp_path):
    put(tmp_path / "out")
    assert (tmp_path / "out" / REPORT_FILE).read_text() == "new"
    put(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_touched(tmp_path, overwrite):
    def write_thesis():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("dear")

    with pytest.raises(UserError, match="is not a release"):
        put(tmp_path / "out", overwrite, write_thesis)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"
    assert names(tmp_path) == ["out"]


def test_a_release_that_appears_meanwhile_is_not_replaced_unasked(tmp_path):
    with pytest.raises(UserError, match="overwrite=True"):
        put(tmp_path / "out", meanwhile=lambda: old_release(tmp_path / "out"))
    assert (tmp_path / "out" / REPORT_FILE).read_text() == "old"


def test_what_appears_at_the_last_moment_is_not_touched(tmp_path, monkeypatch):
    """After the last look, between the renames of the old release and the new one."""
    out = old_release(tmp_path / "out")
    rename, met = Path.rename, []

    def late(path: Path, target: Path):
        if path.name == "trained":
            met.append(path)
            out.mkdir()
            (out / "thesis.tex").write_text("dear")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(UserError, match="appeared while the release was being finished"):
        put(out, overwrite=True)
    assert met
    assert names(out) == ["thesis.tex"]
    (kept,) = tmp_path.glob(".out.old-*")  # the old release, which finds no place either
    assert (kept / REPORT_FILE).read_text() == "old"


def test_an_old_release_is_put_back_when_the_new_one_cannot_be(tmp_path, monkeypatch):
    out = old_release(tmp_path / "out")
    rename = Path.rename

    def failing(path: Path, target: Path):
        if path.name == "trained":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        put(out, overwrite=True)
    assert (out / REPORT_FILE).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_to_work_in_that_is_somebody_elses_is_refused(tmp_path):
    (tmp_path / "out.merging").mkdir()
    (tmp_path / "out.merging" / "notes.txt").write_text("dear")
    with pytest.raises(UserError, match="was not made by a merge"):
        put(tmp_path / "out")
    assert (tmp_path / "out.merging" / "notes.txt").read_text() == "dear"


@pytest.mark.parametrize("inside", [(), (LOCK_FILE,)])
def test_a_folder_to_work_in_is_never_a_link(tmp_path, inside):
    (tmp_path / "precious").mkdir()
    for name in ("dear.txt", *inside):
        (tmp_path / "precious" / name).write_text("dear")
    (tmp_path / "out.merging").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="was not made by a merge"):
        put(tmp_path / "out")
    assert (tmp_path / "precious" / "dear.txt").read_text() == "dear"


def test_what_a_killed_merge_left_is_removed(tmp_path):
    (tmp_path / "out.merging" / "trained").mkdir(parents=True)
    (tmp_path / "out.merging" / "trained" / "model.safetensors").write_text("half")
    (tmp_path / "out.merging" / LOCK_FILE).write_text("")
    old_release(tmp_path / ".out.old-abc")
    put(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_only_old_releases_of_this_very_place_are_removed(tmp_path):
    out = tmp_path / "[xy]"
    old_release(tmp_path / ".[xy].old-abc")
    old_release(tmp_path / ".x.old-abc")  # what the name would match as a pattern
    (tmp_path / ".[xy].old-mine").mkdir()
    (tmp_path / ".[xy].old-mine" / "thesis.tex").write_text("dear")
    put(out)
    assert names(tmp_path) == [".[xy].old-mine", ".x.old-abc", "[xy]"]


def test_a_link_to_a_release_is_refused_before_anything_is_done(tmp_path):
    old_release(tmp_path / "real")
    (tmp_path / "latest").symlink_to("real")
    with pytest.raises(UserError, match="is a symbolic link") as caught:
        Place.at(str(tmp_path / "latest")).check(overwrite=True)
    assert str(tmp_path / "real") in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_is_one_message(tmp_path, monkeypatch, code):
    def refusing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refusing)
    with pytest.raises(UserError, match=os.strerror(code)):
        put(tmp_path / "out")


@pytest.mark.parametrize("out", ["", ".", "..", "x/.."])
def test_a_release_needs_a_name(out):
    with pytest.raises(UserError, match="does not name a folder"):
        Place.at(out)
