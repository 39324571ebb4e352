"""The host's memory: how the C library hands it back to the system, and how much of it is available."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

LARGE_BYTES = 1 << 20  # blocks from this size on go back to the system when they are freed
_M_MMAP_THRESHOLD = -3  # glibc, malloc.h


def return_large_blocks() -> bool:
    """Make glibc give each freed block of `LARGE_BYTES` or more back at once; returns whether it could be told.

    By default it raises its threshold up to 32 MiB as large blocks are freed, and then keeps them in heaps that
    small blocks hold open: a step of gpt2-large on a CPU kept more than a GiB so. Source: mallopt(3).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES) == 1


def available_bytes() -> int | None:
    """What a process can still take of the host's memory without swapping; None where the system does not tell.

    In a container with a limit of its own (cgroup v2) it is no more than that leaves. Source: proc_meminfo(5).
    """
    told = (_meminfo_bytes(Path("/proc/meminfo")), _container_bytes(Path("/sys/fs/cgroup")))
    return min((n_bytes for n_bytes in told if n_bytes is not None), default=None)


def _meminfo_bytes(file: Path) -> int | None:
    kib = _numbers(file).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _container_bytes(folder: Path) -> int | None:
    """The limit less what is in use; files that are only cached can go."""
    limit, used = (_numbers(folder / name).get("") for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    return limit - used + _numbers(folder / "memory.stat").get("inactive_file", 0)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers in lines like `name number unit`, by name; of a line with a number alone the name is empty."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return {}
    named = [["", *words] if len(words) == 1 else words for words in lines]
    return {words[0]: int(words[1]) for words in named if len(words) > 1 and words[1].isdigit()}
