"""Memory that an export no longer needs, given back to the system between its phases."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def give_back() -> None:
    """Collect garbage, and have glibc give back the free pages inside its heap. It keeps them otherwise, and the layers
    that are made and dropped while a network is loaded and traced leave holes as large as the network's weights."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library, which has no such call
            ctypes.CDLL("libc.so.6").malloc_trim(0)
