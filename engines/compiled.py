"""What backends compiled, kept on disk: one folder for each graph, engine, version and CPU. Knows no backend.

A folder holds whatever its backend puts there; it is used again only for the very same contents. `trim` keeps the
whole within a size by removing what was used longest ago.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import EngineError
from ..known_hashes import known_sha256
from ..onnx_file import read_weights

log = logging.getLogger(__name__)


def entry(cache: Path, engine: str, version: str, identity: str) -> Path:
    """The folder in `cache` for what `engine` makes of the graph that `identity` stands for; it may not exist yet."""
    facts = "\n".join((engine, version, _instructions(), identity))
    return cache / f"{engine}-{version}" / hashlib.sha256(facts.encode()).hexdigest()[:32]


def _instructions() -> str:
    """The CPU's kind and, where Linux tells, its instruction sets: what was compiled for one may not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    sets = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {sets}"


def identity_of(path: Path, weights: Mapping[str, NDArray[Any]]) -> str:
    """A text that another graph, other weights or other replaced ones do not share."""
    digest = hashlib.blake2b()
    for file in sorted({path, *(weight.file for weight in read_weights(path).values())}):
        digest.update(known_sha256(file).encode())
    for name in sorted(weights):
        digest.update(f"\n{name} {weights[name].shape}".encode())
        digest.update(weights[name].data)
    return digest.hexdigest()


def prepared_bytes(path: Path, width: int = 4) -> int:
    """About what a backend keeps of a graph: its weights, floats at `width` bytes each, the precision it computes in."""
    weights = read_weights(path).values()
    return sum(math.prod(w.shape) * (width if w.dtype in ("fp32", "fp16", "bf16") else 1) for w in weights)


def has_room(folder: Path, size: int, needed: bool = False) -> bool:
    """Can `size` bytes be kept in `folder`, one of `entry`'s? If not, a warning; EngineError where that is `needed`."""
    cache = folder.parent.parent
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            free = shutil.disk_usage(folder.parent).free
        fault = f"has only {free >> 20} MB free" if free < size else ""
    except OSError as failure:
        fault = f"can't be written ({failure.strerror})"
    if fault and needed:
        raise EngineError(
            f"{cache} {fault}, and --memory low keeps {(size >> 20) + 1} MB of this network there; set VEGA_EDGE_HOME to a "
            "folder with room, or VEGA_EDGE_CACHE_GB=0 to do without, which takes more memory"
        )
    if fault:
        _warn(f"{cache} {fault}")
    return not fault


@functools.cache  # once a process, not once a network
def _warn(fault: str) -> None:
    log.warning(
        "%s: what is compiled is not kept, and compiled again next time; set VEGA_EDGE_HOME to a folder with room, or "
        "VEGA_EDGE_CACHE_GB=0", fault,
    )  # fmt: skip


def used(folder: Path) -> None:
    """Notes that `folder` was used now."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def trim(cache: Path, limit_bytes: int) -> list[Path]:
    """Removes the folders used longest ago until the rest fits `limit_bytes`, and says which; the newest one stays.

    A folder that another process has open keeps working there (POSIX), or can't be removed and stays (Windows).
    """
    sized = []
    for folder in cache.glob("*/*"):
        with contextlib.suppress(OSError):  # another process may be trimming too
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            sized.append((folder.stat().st_mtime, size, folder))
    sized.sort(reverse=True)
    kept, removed = 0, []
    for i, (_, size, folder) in enumerate(sized):
        kept += size
        if i and kept > limit_bytes:
            shutil.rmtree(folder, ignore_errors=True)
            kept -= size
            removed.append(folder)
    if removed:
        log.info("compiled graphs: %d of %d removed, to stay below %d MB", len(removed), len(sized), limit_bytes >> 20)
    return removed
