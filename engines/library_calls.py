"""Calls into the engines' libraries, counted, so that Python does not end while one is under way.

A daemon thread that returns from a library while Python ends is ended at that point (until Python 3.14), and the C++ that
it returns through aborts the process: the program's exit code is lost. So Python's end waits for the calls under way, and
a thread that would begin one after that sleeps until the process is gone.
"""

from __future__ import annotations

import atexit
import os
import threading


class LibraryCalls:
    """A context manager for each call; may be nested. The thread that calls `finish` is never held back."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._changed = threading.Condition()
        self._depth: dict[int, int] = {}  # thread -> how many of these blocks it is in
        self._last: int | None = None  # the thread that ends Python

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._last not in (None, me) and me not in self._depth:
                self._changed.wait()
            self._depth[me] = self._depth.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._depth[me] -= 1
            if not self._depth[me]:
                del self._depth[me]
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait for the other threads' calls under way; from now on they begin none."""
        with self._changed:
            self._last = threading.get_ident()
            while self._depth.keys() - {self._last}:
                self._changed.wait()


library_calls = LibraryCalls()
atexit.register(library_calls.finish)
if hasattr(os, "register_at_fork"):  # the threads of the parent, and what they hold, are not in a child
    os.register_at_fork(after_in_child=library_calls.reset)
