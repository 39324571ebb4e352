"""The folder of a search: checks, removal."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_kit.errors import UserError
from qlora_kit.runs.folder import RunFolder
from qlora_kit.system.files import check_writable
from qlora_kit.system.locks import is_held, locked

DB_FILE, LOCK_FILE, RUNS = "search.db", "search.lock", "runs"


def exists(folder: Path) -> bool:
    """Whether there is a search in `folder`, even if only started."""
    return (folder / LOCK_FILE).is_file()


def is_idle(folder: Path) -> bool:
    """Whether no process works on a trial of the search in `folder`; call it with the lock of the search."""
    return not any(is_held(file) for file in folder.glob(f"{RUNS}/*/{LOCK_FILE}"))


def check_place(folder: Path) -> None:
    """Check that `folder` is a search or can become one. Raises `UserError`."""
    RunFolder.at(folder)
    check_writable(folder)
    if folder.exists() and not exists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        rule = "already exists and is not a search, so it is never replaced"
        raise UserError.of("out", str(folder), rule, "Choose another folder.")


def remove(folder: Path) -> None:
    """Remove the search in `folder`, if there is one. Raises `UserError` if another process works in it."""
    if not exists(folder):
        return
    if folder.is_symlink():
        remedy = f"Give the folder that it points to, {folder.resolve()}, or choose another."
        raise UserError.of("out", str(folder), "is a symbolic link, which is never replaced", remedy)
    with locked(folder / LOCK_FILE):
        if not is_idle(folder):
            rule = "is in use by another process"
            raise UserError.of("out", str(folder), rule, "Stop it first, or choose another folder.")
        shutil.rmtree(folder)


def discard_if_empty(folder: Path) -> bool:
    """Remove the search unless a fold is finished or another process works in it; returns whether it is gone.

    It also stays if it holds a file that a search without a finished fold does not have.
    """
    with locked(folder / LOCK_FILE):
        files = (file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
        if not all(file.name.startswith((DB_FILE, LOCK_FILE)) or file.suffix == ".log" for file in files):
            return False
        if not is_idle(folder):
            return False
        shutil.rmtree(folder.resolve())  # behind a link, which stays
    return True
