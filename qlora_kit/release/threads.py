"""Several tensors at once, within a bound on memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The results of `work` on `items`, in their order, as many at once as torch has threads.

    Each runs its operations in one thread. After an error, items that have not begun are skipped.
    """
    import torch

    count = torch.get_num_threads()
    if count == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(count)
    try:
        for future in [executor.submit(work, item) for item in items]:
            yield future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(count)


class Room:
    """Memory shared by threads: each waits until what it takes fits, or nobody else has any."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.taken_bytes = limit_bytes, 0
        self.changed = threading.Condition()

    @contextmanager
    def taken(self, n_bytes: int) -> Iterator[None]:
        """Have `n_bytes` of it for a while."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken_bytes or self.taken_bytes + n_bytes <= self.limit_bytes)
            self.taken_bytes += n_bytes
        try:
            yield
        finally:
            with self.changed:
                self.taken_bytes -= n_bytes
                self.changed.notify_all()
