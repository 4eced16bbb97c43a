"""Prepares the folder that travels, and says which commands carry it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from . import calls, pack, wheels


def prepare(root: Path, kit: Path, preset: int) -> None:
    """Fetch, repack and cut; what was fetched and repacked before is taken again."""
    found = wheels.download(kit / "wheels")
    (kit / "archives").mkdir(exist_ok=True)
    archives = {}
    for name, files in found.items():
        archive = kit / "archives" / f"{name}.tar.xz"
        if not archive.is_file() or archive.stat().st_mtime < max(file.stat().st_mtime for file in files):
            start, part = time.monotonic(), archive.with_suffix(".part")
            pack.repack(files, part, preset)
            part.replace(archive)
            size = sum(file.stat().st_size for file in files)
            print(f"{name}: {size / 1e6:.0f} MB of wheels, {archive.stat().st_size / 1e6:.0f} MB with xz, {time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
        archives[name] = archive
    room = pack.part_bytes(root)
    facts = {"commit": _commit(root), "python": wheels.PYTHON, "wheels": wheels.WHEELS}
    count = pack.split(archives, kit, room, wheels.LAST, facts)
    print(f"{count} parts of at most {room / 2**20:.1f} MiB beside the working tree")


def commands(root: Path, kit: Path, back: str) -> str:
    """Return the commands as text. SystemExit if nothing was prepared, or if the tree has grown too much since."""
    try:
        manifest = json.loads((pack.part_folder(kit, 1) / pack.MANIFEST).read_text(encoding="utf-8"))
    except OSError as failure:
        raise SystemExit(f"{kit} was not prepared; run: python -m benchmarks.gpu_kit prepare") from failure
    largest = max(
        sum(file.stat().st_size for file in pack.part_folder(kit, number).iterdir())
        for number in range(1, manifest["parts"] + 1)
    )
    if largest > pack.part_bytes(root) + pack.SLACK:
        raise SystemExit(f"a part of {largest / 2**20:.1f} MiB no longer fits an upload beside the working tree; run: python -m benchmarks.gpu_kit prepare")  # fmt: skip
    return calls.told(calls.calls(manifest, kit.as_posix(), back))


def _commit(root: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
