"""Wheels into parts that fit an upload: repacked with xz, cut, and each piece with its hash."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

UPLOAD = 64 << 20  # bytes of one upload, the working tree included
SLACK = 2 << 20  # names, padding, and what the tree grows by before it travels
MANIFEST = "manifest.json"
MANIFEST_ROOM = 64 << 10
_CHUNK = 1 << 20


def tree_files(root: Path) -> list[Path]:
    """List what travels of the working tree: files that git tracks, and others that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    return [root / name for name in listed if name and (root / name).is_file()]


def part_bytes(root: Path) -> int:
    """Return the room for a part beside the working tree as it is now."""
    tree = sum(file.stat().st_size for file in tree_files(root))
    room = UPLOAD - tree - SLACK
    if room < 1 << 20:
        raise SystemExit(f"the working tree takes {tree / 2**20:.1f} MiB, which leaves no room in an upload of {UPLOAD >> 20} MiB")  # fmt: skip
    return room


def repack(wheels: Sequence[Path], archive: Path, preset: int = 6) -> None:
    """Write the wheels' files as one tar.xz, each where pip would install it. Scripts are left out."""
    with lzma.open(archive, "wb", preset=preset) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as files:
                for entry in sorted(files.infolist(), key=lambda each: each.filename):
                    place = _place(entry.filename)
                    if entry.is_dir() or not place:
                        continue
                    member = tarfile.TarInfo(place)
                    member.size, member.mode = entry.file_size, 0o644
                    with files.open(entry) as content:
                        tar.addfile(member, content)


def _place(name: str) -> str:
    """'' for what is not installed beside the packages."""
    first, _, rest = name.partition("/")
    if not first.endswith(".data"):
        return name
    kind, _, rest = rest.partition("/")
    return rest if kind in ("purelib", "platlib") else ""


def split(archives: Mapping[str, Path], folder: Path, room: int, alone: str, facts: Mapping[str, Any]) -> int:
    """Cut `archives`, in their order, into folder/part-01, part-02, ... of `room` bytes; returns how many.

    The archive `alone` begins a part of its own. Each part has its pieces and the whole manifest.
    """
    for old in folder.glob("part-*"):
        shutil.rmtree(old)
    number, left, told = 0, 0, dict[str, Any]()
    for name, archive in archives.items():
        pieces, offset, size = list[dict[str, Any]](), 0, archive.stat().st_size
        if name == alone:
            left = 0
        with archive.open("rb") as content:
            while offset < size:
                if left == 0:
                    number, left = number + 1, room - MANIFEST_ROOM
                    part_folder(folder, number).mkdir(parents=True)
                file = f"{name}.{len(pieces):03}"
                written, digest = _copy(content, part_folder(folder, number) / file, min(left, size - offset))
                pieces.append({"part": number, "file": file, "offset": offset, "bytes": written, "sha256": digest})
                offset, left = offset + written, left - written
        told[name] = {"bytes": size, "sha256": file_hash(archive), "pieces": pieces}
    text = json.dumps({**facts, "parts": number, "archives": told}, indent=1)
    for part in range(1, number + 1):
        (part_folder(folder, part) / MANIFEST).write_text(text, encoding="utf-8")
    return number


def part_folder(folder: Path, number: int) -> Path:
    return folder / f"part-{number:02}"


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _copy(content: Any, into: Path, size: int) -> tuple[int, str]:
    digest, left = hashlib.sha256(), size
    with into.open("wb") as out:
        while left:
            chunk = content.read(min(_CHUNK, left))
            digest.update(chunk)
            out.write(chunk)
            left -= len(chunk)
    return size, digest.hexdigest()
