"""The store on the GPU machine: parts are appended here, checked, unpacked, and found again by the next command.

    archives/NAME.tar.xz   as far as it has come
    site/                  the packages of the archives that are complete, for PYTHONPATH
    tree/vega_edge         a link to the working tree, by the name that it is imported by
    results.jsonl, logs/   what was measured, a line for each attempt at a step
    home/, bundles/, ...   caches and exported bundles

Needs Python alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STORE = Path("build") / "gpu-store"


class KitError(SystemExit):
    """One line, and exit status 1."""


def receive(part: Path, store: Path) -> list[str]:
    """Append the pieces of one part to their archives; returns the names of those that became complete.

    A part that came before changes nothing. Raises KitError for a piece that is missing or damaged, and for a part whose
    predecessor has not come.
    """
    try:
        manifest = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
    except OSError as failure:
        raise KitError(f"{part} has no {MANIFEST}: is the folder among those that the command carries?") from failure
    _begin(store, manifest)
    number, complete = int(part.name.rpartition("-")[2]), []
    for name, archive in manifest["archives"].items():
        if (store / "archives" / f"{name}.done").is_file():
            continue
        for piece in archive["pieces"]:
            if piece["part"] == number:
                _append(part, piece, store / "archives" / f"{name}.tar.xz", archive["pieces"])
        if _size(store / "archives" / f"{name}.tar.xz") == archive["bytes"]:
            _unpack(store, name, archive["sha256"])
            complete.append(name)
    return complete


def complete(store: Path) -> set[str]:
    """Return the names of the archives that are unpacked."""
    return {done.stem for done in (store / "archives").glob("*.done")}


def _begin(store: Path, manifest: dict[str, Any]) -> None:
    """Parts of another preparation can't be mixed with these: what came of those is dropped. Results stay."""
    identity, known = json.dumps(manifest, sort_keys=True), store / MANIFEST
    if known.is_file() and json.dumps(json.loads(known.read_text(encoding="utf-8")), sort_keys=True) == identity:
        return
    for folder in ("archives", "site"):
        shutil.rmtree(store / folder, ignore_errors=True)
    (store / "archives").mkdir(parents=True)
    (store / "site").mkdir()
    known.write_text(json.dumps(manifest), encoding="utf-8")


def _append(part: Path, piece: dict[str, Any], archive: Path, pieces: list[dict[str, Any]]) -> None:
    file = part / piece["file"]
    if not file.is_file():
        raise KitError(f"{file} is missing: send {part.name} again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != piece["sha256"]:
        raise KitError(f"{file} is damaged (its hash is not the manifest's): send {part.name} again")
    have = _size(archive)
    if have >= piece["offset"] + piece["bytes"]:
        return
    if have < piece["offset"]:
        lacking = next(each["part"] for each in pieces if each["offset"] + each["bytes"] > have)
        raise KitError(f"part-{lacking:02} has not come yet: send it before {part.name}")
    with archive.open("ab") as out:
        out.truncate(piece["offset"])  # of an append that was interrupted
        out.seek(piece["offset"])
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _unpack(store: Path, name: str, digest: str) -> None:
    archive, work = store / "archives" / f"{name}.tar.xz", store / f"unpacking-{name}"
    have = hashlib.sha256()
    with archive.open("rb") as content:
        while chunk := content.read(1 << 20):
            have.update(chunk)
    if have.hexdigest() != digest:
        archive.unlink()
        raise KitError(f"{name} is damaged (its hash is not the manifest's) and was deleted: send all its parts again")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive, "r|xz") as tar:
        tar.extractall(work, **safe)
    for entry in sorted(work.iterdir()):
        shutil.rmtree(store / "site" / entry.name, ignore_errors=True)
        entry.rename(store / "site" / entry.name)
    work.rmdir()
    (store / "archives" / f"{name}.done").write_text(digest)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
