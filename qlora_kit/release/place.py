"""Where a release is written: beside its final place, and renamed when it is whole.

release/x.merging/   while it is made; a killed merge leaves it, and the next one to the same place removes it
release/x/           complete, or not there
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_kit import runs
from qlora_kit.errors import UserError

MERGING = ".merging"
REPORT_FILE = "merge_report.json"
LOCK_FILE = ".lock"
SETTING = "--out"


@dataclass(frozen=True)
class Place:
    """The final folder of a release, and the one that it is made in."""

    final: Path
    working: Path

    @classmethod
    def at(cls, out: str) -> Place:
        """The place of the release `out`. Raises `UserError` for no name of its own."""
        final = Path(out)
        if final.name in ("", ".."):
            raise UserError.of(SETTING, out, "names no folder of its own", "For example --out release/x.")
        return cls(final, final.with_name(final.name + MERGING))

    def check(self, overwrite: bool) -> None:
        """Check that the place can be written and nothing would be overwritten unasked. Raises `UserError`."""
        runs.check_writable(self.final)
        if not os.path.lexists(self.final):
            return
        if not _may_be_replaced(self.final):
            rule = "already exists and is no release, so it is never replaced"
            raise UserError.of(SETTING, str(self.final), rule, "Choose another folder.")
        if not overwrite:
            remedy = "Choose another folder, or add --overwrite."
            raise UserError.of(SETTING, str(self.final), "already exists", remedy)

    @contextmanager
    def made(self) -> Iterator[Path]:
        """The folder to work in, new and empty; it vanishes at the end, whatever happened.

        Raises `UserError` where it cannot be written, or another merge is writing there.
        """
        new_parents = [folder for folder in self.working.absolute().parents if not folder.exists()]
        with runs.disk_errors(self.final):
            lock = self._begin()
            try:
                yield self.working
            finally:
                shutil.rmtree(self.working, ignore_errors=True)
                for folder in new_parents:
                    with contextlib.suppress(OSError):  # the release is in it
                        folder.rmdir()
                os.close(lock)

    def _begin(self) -> int:
        """Make the working folder, remove what a killed merge left in it, and lock it; returns the lock."""
        try:
            self.working.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.working / LOCK_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise runs.unwritable(str(self.final), error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            rule = f"another merge is writing {self.working}"
            raise UserError.of(SETTING, str(self.final), rule, "Wait for it, or choose another folder.") from None
        for leftover in self.working.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK_FILE:
                leftover.unlink()
        return lock

    def put(self, whole: Path) -> None:
        """Put the finished folder `whole` in the final place; what it replaces is removed only then."""
        _sync(whole)
        set_aside = f".{self.final.name}.old-"
        if self.final.exists():
            self.final.rename(tempfile.mkdtemp(dir=self.final.parent, prefix=set_aside))
        whole.rename(self.final)
        _sync(self.final.parent)
        for old in self.final.parent.glob(f"{set_aside}*"):  # also of a merge that was killed just here
            shutil.rmtree(old)


def _may_be_replaced(folder: Path) -> bool:
    """Whether `folder` is a release, or holds nothing: anything else may be dear to its owner."""
    return folder.is_dir() and ((folder / REPORT_FILE).is_file() or not any(folder.iterdir()))


def _sync(folder: Path) -> None:
    """Put the names in `folder` on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
