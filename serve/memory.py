"""How much memory this process has, where Prometheus' own collector does not know: it reads /proc alone."""

from __future__ import annotations

import ctypes
import sys

HAS_PROC = sys.platform == "linux"


def resident_bytes() -> float:
    """Windows: the working set now. macOS, which tells a program nothing else without more ado: the largest so far."""
    if sys.platform == "win32":
        return float(_counters().working_set)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)  # Linux counts KiB


class _Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS of psapi.h
    _fields_ = [("size", ctypes.c_uint32), ("page_faults", ctypes.c_uint32)] + [
        (name, ctypes.c_size_t)
        for name in (
            "peak_working_set", "working_set", "peak_paged", "paged", "peak_nonpaged", "nonpaged", "pagefile",
            "peak_pagefile",
        )
    ]  # fmt: skip


def _counters() -> _Counters:
    counters = _Counters()
    counters.size = ctypes.sizeof(counters)
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    get = kernel.K32GetProcessMemoryInfo
    get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
    if not get(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.size):
        raise OSError("the system does not tell this process's memory")
    return counters
