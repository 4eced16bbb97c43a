"""What backends compiled, kept on disk: one folder for each graph, engine, version and CPU. Knows no backend.

A folder holds whatever its backend puts there; it is used again only for the very same contents. `trim` keeps the
whole within a size by removing what was used longest ago.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

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
    """A text that another graph, other weights or other replaced ones do not share. Reads every byte."""
    digest = hashlib.blake2b()
    for file in sorted({path, *(weight.file for weight in read_weights(path).values())}):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    for name in sorted(weights):
        digest.update(f"\n{name} {weights[name].shape}".encode())
        digest.update(weights[name].data)
    return digest.hexdigest()


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
