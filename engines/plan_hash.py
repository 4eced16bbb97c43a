"""What tells one graph from another. Knows no TensorRT."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..known_hashes import known_sha256
from ..manifest import MANIFEST, Manifest


def graph_hash(graph: Path) -> str:
    """Hex sha256 of a bundle's graph and the files its weights are in: by its manifest where it has one, else by reading them."""
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
        digest.update(f"{name} {entry.sha256 if entry else known_sha256(folder / name)}\n".encode())
    return digest.hexdigest()
