"""The host's memory: how the C library hands it back to the system, and how much of it is available.

glibc has one way for the whole process (mallopt(3), malloc_trim(3)), and neither its own nor any one of ours fits all
through. While a model is built (loaded, quantized, merged) large blocks come and go once: each is mapped alone, and
goes back when it is freed. While it runs (training, answers, scores) the same sizes come and go at every step: mapped
alone, each would be given by the system page by page and zeroed again, so they stay in the heap.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


@dataclass(frozen=True)
class Policy:
    """Blocks of `mapped_bytes` or more go back when freed; of smaller ones the heap keeps `kept_bytes` at its end."""

    mapped_bytes: int
    kept_bytes: int


# By default glibc raises the first up to 32 MiB as large blocks are freed, and small blocks then hold open the heaps
# that had a model's garbage in them: more than a GiB. Once set, it no longer adapts by itself.
BUILDING = Policy(mapped_bytes=1 << 20, kept_bytes=128 << 10)  # the second is glibc's default
RUNNING = Policy(mapped_bytes=32 << 20, kept_bytes=512 << 20)  # the first is the most that glibc takes

_open_buildings = 0  # as the policy, of the whole process


def apply(policy: Policy) -> bool:
    """Make the C library follow `policy` from now on; returns whether it can: only glibc does."""
    libc = _glibc()
    if libc is None:
        return False
    limits = {_M_MMAP_THRESHOLD: policy.mapped_bytes, _M_TRIM_THRESHOLD: policy.kept_bytes}
    return [libc.mallopt(limit, n_bytes) for limit, n_bytes in limits.items()] == [1, 1]


@contextmanager
def building(device_type: str = "cpu") -> Iterator[None]:
    """Within, the policy is `BUILDING`, and after the outermost `RUNNING`; no effect unless the model is on a CPU.

    Memory that an earlier model left in the heap is given back first.
    """
    global _open_buildings
    if device_type != "cpu":
        yield
        return
    if not _open_buildings:
        apply(BUILDING)
        _give_back()
    _open_buildings += 1
    try:
        yield
    finally:
        _open_buildings -= 1
        if not _open_buildings:
            apply(RUNNING)


def _give_back() -> None:
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process if it is glibc, else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def available_bytes() -> int | None:
    """The host memory that a process can still take without swapping; None if the system does not report it.

    In a container with a memory limit (cgroup v2) it is at most what the limit leaves. Source: proc_meminfo(5).
    """
    reported = (_meminfo_bytes(Path("/proc/meminfo")), _container_bytes(Path("/sys/fs/cgroup")))
    return min((n_bytes for n_bytes in reported if n_bytes is not None), default=None)


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
