"""Copies of a test's process, for what must be killed or measured apart."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_a_child(task: Callable[[], object]) -> int:
    """Start `task` in a copy of this process, which has everything imported; gives its number.

    It ends with 1 where the task raised something.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException:  # noqa: BLE001  # whatever it is, the parent must hear of it
            traceback.print_exc()
        finally:
            os._exit(status)
    return child
