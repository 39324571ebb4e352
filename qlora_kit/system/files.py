"""Writes files whole or not at all, and turns disk errors into messages for the user."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qlora_kit.errors import UserError

OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
)
LIBRARIES = ("qlora_kit", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a sibling temporary, then a rename."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree on PYTHONPATH
            found[name] = "not installed"
    return found


def empty_folder(folder: Path, keep: str) -> None:
    """Remove all that is in `folder` but the file called `keep`; links are removed and not followed.

    Nothing happens where `folder`, or something in it, has gone meanwhile.
    """
    with suppress(FileNotFoundError):
        for leftover in folder.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name != keep:
                leftover.unlink()


def check_writable(folder: Path) -> None:
    """Check that `folder` can be created. Raises `UserError`."""
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise unwritable(str(folder), OSError(errno.EACCES, f"{parent} is not a folder that you can write to"))


def check_file(file: Path) -> None:
    """Check that `file` can be written and is not a folder. Raises `UserError`."""
    if file.is_dir():
        raise UserError.of("out", str(file), "is a folder", "Give the name of a file.")
    check_writable(file)


def unwritable(out: str, error: OSError) -> UserError:
    """The error for an output folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError.of("out", out, "the disk is full", "Free some space, or choose another disk.")
    return UserError.of("out", out, f"cannot be written ({error.strerror})", "Choose a folder that you can write to.")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk, or of an impossible path, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise unwritable(str(out), error) from error
        raise
    except (SafetensorError, RuntimeError) as error:  # how safetensors and torch.save report the same
        if any(sign in str(error) for sign in ("No space left", "PytorchStreamWriter failed", "unexpected pos")):
            raise unwritable(str(out), OSError(errno.ENOSPC, "No space left on device")) from error
        raise


def require_space(folder: Path, needed_bytes: int, out: Path | None = None) -> None:
    """Check that the disk of `folder` has `needed_bytes` free. Raises `UserError`, which shows `out` as the value."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        rule = f"needs {needed_bytes / 2**20:.0f} MiB, and the disk has {free_bytes / 2**20:.0f} MiB free"
        raise UserError.of("out", str(out or folder), rule, "Free some space, or choose another disk.")
