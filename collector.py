"""Python's collector of cycles, kept away from what it would slow down or break."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_blocks, _was_on = 0, False  # of all threads: the collector is the process's


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """The block runs without it. It comes back when the last such block, in whatever thread, has ended, if it was on
    before the first."""
    global _blocks, _was_on
    with _lock:
        if not _blocks:
            _was_on = gc.isenabled()
            gc.disable()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks and _was_on:
                gc.enable()
