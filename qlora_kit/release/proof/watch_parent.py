"""A process that ends when the one that started it does, however that ended.

The parent holds the other end of this one's standard input and never writes to it.
"""

import os
import threading


def end_with_parent() -> None:
    """Watch standard input in a thread, and leave at once when it closes."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be missed at the end
        pass
    os._exit(1)
