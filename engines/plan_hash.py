"""What tells one graph from another. Knows no TensorRT."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import BundleError
from ..known_hashes import known_sha256
from ..manifest import MANIFEST, Manifest
from ..onnx_file import read_weights


def graph_hash(graph: Path) -> str:
    """Hex sha256 of a bundle's graph and the files its weights are in: by its manifest where it has one, else by reading
    them. Other files beside them, which a file manager leaves, are nothing to it."""
    folder = graph.parent
    manifest = folder.parent / MANIFEST
    hashes: dict[str, str] = {}
    if manifest.is_file():
        parts = Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest).parts
        listed = parts[folder.name].files if folder.name in parts else {}
        hashes = {name.removeprefix(f"{folder.name}/"): entry.sha256 for name, entry in listed.items()}
    if graph.name in hashes:
        weights = {name for name in hashes if not name.endswith((".onnx", ".json"))}
    else:
        weights = {file.relative_to(folder).as_posix() for file in _weights_files(graph)}
    digest = hashlib.sha256()
    for name in (graph.name, *sorted(weights)):
        digest.update(f"{name} {hashes.get(name) or known_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _weights_files(graph: Path) -> set[Path]:
    try:
        return {weight.file for weight in read_weights(graph).values()} - {graph}
    except BundleError:  # nobody can tell which: it may be of a kind that only its library reads
        return {file for file in graph.parent.iterdir() if file.is_file() and file.suffix not in (".onnx", ".json")}
