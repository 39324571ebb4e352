"""Locks between processes that die with the process, so that a killed one never blocks the others.

They are flock(2) locks on files of their own: the kernel releases them when the last descriptor is closed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".qlora_kit.lock"  # in a folder that a run or a merge works in, which is known by it


class Lock:
    """The lock of `file`, held from `take` until `release` or the end of the process."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file = file
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Release it; calling it again changes nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def take(file: Path, wait: bool) -> Lock | None:
    """The lock of `file`, whose folder is created if missing; without `wait`, None if another process holds it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # the folder was removed meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(file, descriptor):
            return Lock(file, descriptor)
        os.close(descriptor)  # its holder removed it, and there may be a new file in its place


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def is_held(file: Path) -> bool:
    """Whether another process holds the lock of `file`; a missing file is not created."""
    lock = take(file, wait=False) if file.is_file() else None
    if lock is not None:
        lock.release()
    return lock is None and file.is_file()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of `file` within."""
    lock = take(file, wait=True)
    assert lock is not None, "it was waited for"
    try:
        yield
    finally:
        lock.release()
