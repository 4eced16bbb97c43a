"""What tells one graph and one file from another: hex sha256. Knows no TensorRT."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..manifest import MANIFEST, Manifest
from ..whole_file import sha256_of


def graph_hash(graph: Path) -> str:
    """Of a bundle's graph and the files its weights are in: by its manifest where it has one, else by reading them."""
    folder = graph.parent
    manifest = folder.parent / MANIFEST
    listed: Mapping[str, Any] = {}
    if manifest.is_file():
        parts = Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest).parts
        listed = parts[folder.name].files if folder.name in parts else {}
    names = [graph.name, *sorted(p.name for p in folder.iterdir() if p.suffix not in (".onnx", ".json"))]
    digest = hashlib.sha256()
    for name in names:
        entry = listed.get(f"{folder.name}/{name}")
        digest.update(f"{name} {entry.sha256 if entry else sha256_of(folder / name)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path, state: os.stat_result) -> str:
    """Of a file in the `state` that it is in. This process reads it once, unless it changes."""
    return _remembered(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=64)
def _remembered(path: Path, size: int, changed_ns: int, inode: int) -> str:
    return sha256_of(path)
