"""A logger for TensorRT and TensorRT-RTX, and what is made with one.

The library holds a lock of its own while it makes or ends a Builder or a Runtime, and meanwhile calls the logger, which
needs Python's. Whoever has Python's lock by then and wants the library's waits for ever: a second thread that makes or
ends one, or a collection that starts in the logger and finds one to end. (Seen with TensorRT-RTX 1.7.)
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ..collector import uncollected

_turn = threading.Lock()


def logger(trt: Any, said: list[str], tell: Callable[[str], None]) -> Any:
    """Tells all that the library says; its errors go to `said` too, each as one line."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                said.append(" ".join(message.split()))
            tell(message)

    return Logger()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """To make or end a Builder or a Runtime in: one thread at a time, and nothing is collected. An exception that leaves
    the block holds the frames it came through; what the functions called in it had made ends here, too."""
    with _turn, uncollected():
        try:
            yield
        except BaseException as failure:
            traceback.clear_frames(failure.__traceback__)
            raise
