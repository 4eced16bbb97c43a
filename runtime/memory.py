"""The sizes of a bundle's networks, and the memory that is free."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # bytes; version 1 writes nearly 2**63 if there is none
_CGROUPS = (  # limit, usage, prefix of the counts of file pages in memory.stat
    (_CGROUP / "memory.max", _CGROUP / "memory.current", ""),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes", "total_"),
)


def weight_bytes(bundle: Path) -> dict[str, int]:
    """Bytes of each network's files in a bundle's folder; graphs that share a weights file count it once."""
    found: dict[str, int] = {}
    for file in bundle.glob("*/*.onnx*"):
        if file.parent.name != "vae_encoder":  # opened for img2img alone
            found[file.parent.name] = found.get(file.parent.name, 0) + file.stat().st_size
    return found


def free_bytes() -> int | None:
    """Return the memory that this process can still get, swap included; None if the system does not report it.

    In a container it is the least of what the machine has and what the limits of its control groups leave.
    """
    found = [free for free in (_system_free_bytes(), _container_free_bytes()) if free is not None]
    return min(found, default=None)


def _container_free_bytes() -> int | None:
    """Version 2 of Linux's control groups, then version 1; a limit that is not set is "max", or larger than any memory.

    File pages are counted as free, mapped weights among them: the kernel takes them back before it refuses memory.
    """
    for limit, usage, prefix in _CGROUPS:
        try:
            allowed, used = int(limit.read_text()), int(usage.read_text())
            if allowed >= _NO_LIMIT:
                continue
            stat = dict(line.split() for line in usage.with_name("memory.stat").read_text().splitlines())
            pages = sum(int(stat.get(f"{prefix}{kind}", 0)) for kind in ("inactive_file", "active_file"))
            return max(allowed - used + pages, 0)
        except (OSError, ValueError):  # no such version here, or "max"
            continue
    return None


def _system_free_bytes() -> int | None:
    if sys.platform == "win32":
        return _windows_free_bytes()
    if not _MEMINFO.is_file():
        return None
    lines = (line.split() for line in _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    if "MemAvailable" not in kilobytes:
        return None
    return (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0)) * 1024


def _windows_free_bytes() -> int | None:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page_total", "page_free", "virtual_total", "virtual_free", "extended")
        ]

    status = Status()
    status.length = ctypes.sizeof(status)
    ok = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status.page_free) if ok else None
