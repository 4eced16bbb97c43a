"""Make all files of pins anew: `make pins`. With --keep, only what pyproject.toml no longer allows moves.

uv resolves on public metadata, for every Python and system at once, and then each file is checked for each of them: every
version that is pinned must have a wheel there. Nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "pins"
SYSTEMS = ("x86_64-manylinux_2_28", "x86_64-pc-windows-msvc")
JETSON = "aarch64-manylinux_2_35"  # JetPack 6 is Ubuntu 22.04
SOURCE_ONLY = (
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
)  # small packages that name others, and are built where they are installed

Extras = tuple[str, ...]
RUNTIME: Extras = ("cpu", "openvino", "tensorrt-rtx", "serve")


class Pins(NamedTuple):
    file: str
    extras: dict[str, Extras]  # the oldest Python that they are for: extras
    pythons: tuple[str, ...]
    systems: tuple[str, ...] = SYSTEMS
    requirements: str = ""  # a file of requirements in pins/, instead of the package's extras
    lowest: bool = False
    note: str = ""


EXPORT: Extras = ("cuda", "export", "train", "test", "reference")  # diffusers needs Python 3.11
FILES = (
    Pins("uv.txt", {}, ("3.11", "3.12", "3.13", "3.14"), requirements="uv.in"),
    Pins("main.txt", {"3.10": RUNTIME, "3.11": EXPORT}, ("3.10", "3.11", "3.12", "3.13", "3.14")),
    Pins("interop.txt", {}, ("3.11", "3.12"), requirements="interop.in"),
    Pins("oldest.txt", {"3.10": (*RUNTIME, "test")}, ("3.10", "3.11", "3.12"), lowest=True,
         note=" The lowest direct versions."),
    Pins("jetson.txt", {"3.10": ("jetson", "serve")}, ("3.10",), (JETSON,),
         note=" Resolved, not installed by the project: it has no Jetson."),
)  # fmt: skip


class Refused(Exception):
    """One line on why there are no pins."""


def where(systems: tuple[str, ...]) -> str:
    return "Linux on aarch64" if systems == (JETSON,) else "Linux and Windows, x86-64"


def header(pins: Pins) -> str:
    first, last = pins.pythons[0], pins.pythons[-1]
    span = first if first == last else f"{first} to {last}"
    return f"# Made by `make pins` for Python {span}, {where(pins.systems)}: docs/environments.md.{pins.note}\n"


def wanted(pins: Pins, project: dict[str, Any], build: list[str]) -> list[str]:
    """Return the requirements, each with a marker where its extra is for newer Pythons only."""
    if pins.requirements:
        return (PINS / pins.requirements).read_text(encoding="utf-8").splitlines()
    rows = [*build, *project["dependencies"]]
    for oldest, extras in pins.extras.items():
        for row in (row for extra in extras for row in project["optional-dependencies"][extra]):
            requirement, _, marker = row.partition(";")
            markers = [f"({marker.strip()})"] if marker else []
            markers += [f"python_version >= '{oldest}'"] if oldest != pins.pythons[0] else []
            rows.append(f"{requirement}; {' and '.join(markers)}" if markers else requirement)
    return rows


def uv(*arguments: str) -> str:
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run([sys.executable, "-m", "uv", "pip", "compile", "--no-header", "--no-annotate", *arguments],
                          cwd=ROOT, env=environment, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise Refused(" ".join(done.stderr.split()))
    return done.stdout


def remake(pins: Pins, project: dict[str, Any], build: list[str], scratch: Path, keep: bool) -> None:
    source, out, target = scratch / f"{pins.file}.in", scratch / pins.file, PINS / pins.file
    source.write_text("\n".join(wanted(pins, project, build)) + "\n", encoding="utf-8")
    if keep and target.is_file():
        shutil.copy(target, out)
    first = pins.pythons[0]
    on = ["--python-platform", JETSON] if pins.systems == (JETSON,) else ["--universal"]
    resolution = ["--resolution", "lowest-direct"] if pins.lowest else []
    uv(str(source), "--output-file", str(out), "--python-version", first, *on, *resolution)
    names = set(re.findall(r"(?m)^[\w.-]+", out.read_text(encoding="utf-8"))) - set(SOURCE_ONLY)
    wheels = [argument for name in sorted(names) for argument in ("--only-binary", name)]
    for python in pins.pythons:
        for system in pins.systems:
            try:
                uv(
                    str(source),
                    "--constraint",
                    str(out),
                    "--python-version",
                    python,
                    "--python-platform",
                    system,
                    *wheels,
                )
            except Refused as fault:
                raise Refused(f"{pins.file}, Python {python} on {system}: {fault}") from None
    text = "".join(
        line for line in out.read_text(encoding="utf-8").splitlines(keepends=True) if not line.startswith("#")
    )
    target.write_text(header(pins) + text, encoding="utf-8", newline="\n")
    print(f"pins/{pins.file}: {len(names)} packages; Python {', '.join(pins.pythons)}; {', '.join(pins.systems)}")


def axios(keep: bool) -> None:
    """Move the lock file of the JavaScript client, without any registry's address in it."""
    npm = shutil.which("npm")
    if not npm:
        print("pins/axios/package-lock.json stays as it is: npm is not installed")
        return
    lock = PINS / "axios" / "package-lock.json"
    command = [
        npm,
        "update" if lock.exists() and not keep else "install",
        "--package-lock-only",
        "--no-fund",
        "--no-audit",
    ]
    done = subprocess.run(
        [*command, "--omit-lockfile-registry-resolved"], cwd=lock.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise Refused(" ".join(done.stderr.split()))
    packages = json.loads(lock.read_text(encoding="utf-8"))["packages"]
    print(f"pins/axios/package-lock.json: axios {packages['node_modules/axios']['version']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the versions that pyproject.toml still allows")
    parser.add_argument("files", nargs="*", help="only these, such as main.txt; all of them by default")
    arguments = parser.parse_args()
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for pins in FILES:
                if not arguments.files or pins.file in arguments.files:
                    remake(pins, tables["project"], tables["build-system"]["requires"], Path(scratch), arguments.keep)
        if not arguments.files:
            axios(arguments.keep)
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
