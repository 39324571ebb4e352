"""How the C library hands memory back to the system, for models that live in the host's memory."""

from __future__ import annotations

import ctypes
import sys

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
