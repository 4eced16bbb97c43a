"""Memory that an export no longer needs, given back to the system: large tensors at once, the rest between its phases.

Both are calls of glibc's; with another C library nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_BYTES = 1 << 20


def map_tensors() -> None:
    """From here on every block of 1 MB and more is mapped for itself, and unmapped when it is freed. glibc would raise
    that limit to 32 MB as soon as such blocks are freed; tensors then lie on the heap, where each that is made and
    dropped leaves a hole, together as large as a network's weights."""
    _call("mallopt", _M_MMAP_THRESHOLD, _MAPPED_BYTES)


def give_back() -> None:
    """Collect garbage, and give back the free pages inside the heap."""
    gc.collect()
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # no glibc, or no such call in it
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
