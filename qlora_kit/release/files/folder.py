"""The place of a release: written beside its final place, and renamed when complete.

release/x.merging/   while it is made; a killed merge leaves it, and the next one to the same place removes it
release/x/           complete, or not there
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import UserError, named
from qlora_kit.system import files, locks
from qlora_kit.system.locks import LOCK_FILE

MERGING = ".merging"
REPORT_FILE = "merge_report.json"
SETTING = "out"
OTHER_FOLDER = "Choose another folder."
GONE = (errno.EIO, errno.ENOENT, errno.ESTALE)  # the disk, or the folder that is written to, went away
IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Place:
    """The final folder of a release, and the one that it is made in."""

    final: Path
    working: Path

    @classmethod
    def at(cls, out: str) -> Place:
        """The place of the release `out`. Raises `UserError` for paths such as `..`."""
        final = Path(out)
        if final.name in ("", ".."):
            raise UserError.of(SETTING, out, "does not name a folder", f"For example {named(SETTING, 'release/x')}.")
        return cls(final, final.with_name(final.name + MERGING))

    def check(self, overwrite: bool) -> None:
        """Check that the place can be written and nothing would be overwritten unasked. Raises `UserError`."""
        files.check_writable(self.final)
        if not os.path.lexists(self.final):
            return
        if self.final.is_symlink():
            remedy = f"Give the folder that it points to, {self.final.resolve()}, or choose another."
            raise UserError.of(SETTING, str(self.final), "is a symbolic link, which is never replaced", remedy)
        if not _may_be_replaced(self.final):
            rule = "already exists and is not a release, so it is never replaced"
            raise UserError.of(SETTING, str(self.final), rule, OTHER_FOLDER)
        if not overwrite:
            remedy = f"Choose another folder, or add {named('overwrite', True)}."
            raise UserError.of(SETTING, str(self.final), "already exists", remedy)

    def require_space(self, needed_bytes: int) -> None:
        """Check that the disk has room for `needed_bytes` while the release is made. Raises `UserError`."""
        files.require_space(self.working, needed_bytes, self.final)

    @contextmanager
    def made(self) -> Iterator[Path]:
        """The folder to work in, new and empty; it is removed at the end, whatever happened.

        Raises `UserError` if it cannot be written, if another merge writes there, or if no merge made it.
        """
        new_parents = [folder for folder in self.working.absolute().parents if not folder.exists()]
        with self._disk_errors():
            lock = self._begin()
            try:
                yield self.working
            finally:
                with contextlib.suppress(OSError):
                    files.empty_folder(self.working, keep=LOCK_FILE)
                shutil.rmtree(self.working, ignore_errors=True)
                for folder in new_parents:
                    with contextlib.suppress(OSError):  # the release is in it
                        folder.rmdir()
                lock.release()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn the errors of a disk that is full, read-only or gone into a `UserError`."""
        try:
            with files.disk_errors(self.final):
                yield
        except OSError as error:
            if error.errno in GONE:
                raise files.unwritable(str(self.final), error) from error
            raise

    def _begin(self) -> locks.Lock:
        """Make the working folder, remove what a killed merge left in it, and lock it; returns the lock."""
        try:
            self._check_own()
            lock = locks.take(self.working / LOCK_FILE, wait=False)
        except OSError as error:
            raise files.unwritable(str(self.final), error) from None
        if lock is None:
            raise self._busy()
        files.empty_folder(self.working, keep=LOCK_FILE)
        return lock

    def _check_own(self) -> None:
        """Check that an existing working folder was made by a merge. Raises `UserError`."""
        if not os.path.lexists(self.working):
            return
        is_folder = self.working.is_dir() and not self.working.is_symlink()
        names = {file.name for file in self.working.iterdir()} if is_folder else set()
        if not is_folder or (names and LOCK_FILE not in names):
            rule = f"needs {self.working}, which exists and was not made by a merge"
            raise UserError.of(SETTING, str(self.final), rule, f"Move that away, or choose another {named(SETTING)}.")

    def _busy(self) -> UserError:
        rule = f"another merge is writing {self.working}"
        return UserError.of(SETTING, str(self.final), rule, "Wait for it, or choose another folder.")

    def put(self, whole: Path, overwrite: bool) -> None:
        """Put the finished folder `whole` in the final place; what it replaces is removed only then.

        The place is checked again, since much may have happened meanwhile. Raises `UserError` as `check` does.
        """
        _sync(whole)
        self.check(overwrite)
        set_aside = f".{self.final.name}.old-"
        old = Path(tempfile.mkdtemp(dir=self.final.parent, prefix=set_aside)) if self.final.exists() else None
        try:
            if old is not None:
                self.final.rename(old)
            whole.rename(self.final)  # which replaces nothing but an empty folder
        except OSError as error:
            if old is not None:
                with contextlib.suppress(OSError):  # where something stands in its place it stays where it is
                    old.rename(self.final) if any(old.iterdir()) else old.rmdir()
            if error.errno not in IN_THE_WAY:
                raise
            rule = "appeared while the release was being finished"
            raise UserError.of(SETTING, str(self.final), rule, OTHER_FOLDER) from None
        _sync(self.final.parent)
        for left in self.final.parent.glob(f"{glob.escape(set_aside)}*"):  # also of a merge that was killed just here
            if _may_be_replaced(left):
                shutil.rmtree(left)


def _may_be_replaced(folder: Path) -> bool:
    """Whether `folder` is a release, or holds nothing: anything else may be dear to its owner."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / REPORT_FILE).is_file() or not any(folder.iterdir())


def _sync(folder: Path) -> None:
    """Put the names in `folder` on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
