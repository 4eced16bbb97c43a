"""Wheels that the GPU machine lacks: which, for what Python and system, and how they are fetched."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PYTHON = "3.12"
# Archives in the order in which they travel. The machine has numpy, torch, onnx, onnxscript, safetensors, tokenizers,
# transformers, pytest, cuda-bindings and CUDA's libraries as packages, and what these need. Exports need accelerate, Pillow
# and psutil too, which travel first, and onnxruntime, which comes with the second archive.
WHEELS: dict[str, tuple[str, ...]] = {
    "peers": (
        "diffusers==0.42.1", "importlib_metadata==10.2.0", "zipp==4.1.2", "accelerate==1.15.0", "pillow==13.0.0", "psutil==7.2.2",
    ),
    "onnxruntime-gpu": ("onnxruntime-gpu==1.31.1",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings==1.7.1.116", "tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13==1.7.1.116"),
}  # fmt: skip
BUILT = "tensorrt-rtx-cu13=="  # published as source alone: a few lines of Python
LAST = "tensorrt-rtx"  # travels after everything else has run
# pip matches a platform to the letter
GLIBC = (39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 12, 5)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + [f"manylinux{n}_x86_64" for n in ("2014", "2010", "1")]
_NAME = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<system>[^-]+)\.whl"
)


class Wheel(NamedTuple):
    name: str
    version: str
    python: tuple[str, ...]
    abi: tuple[str, ...]
    system: tuple[str, ...]


def parse(file: str) -> Wheel:
    """Read a wheel's file name. Raises SystemExit for a name that is none."""
    found = _NAME.fullmatch(file)
    if found is None:
        raise SystemExit(f"{file} is not a wheel's name (NAME-VERSION-PYTHON-ABI-PLATFORM.whl)")
    tags = (tuple(found[part].split(".")) for part in ("python", "abi", "system"))
    return Wheel(found["name"], found["version"], *tags)


def fault(file: str, python: str = PYTHON) -> str:
    """Say why a wheel can't be used on the machine; '' if it can."""
    wheel, tag = parse(file), f"cp{python.replace('.', '')}"
    if not set(wheel.python) & {tag, "py3"} and not _stable(wheel, tag):
        return f"{file} is for {'.'.join(wheel.python)}, and the machine has {tag}"
    if not set(wheel.abi) & {tag, "none", "abi3"}:
        return f"{file} has the ABI {'.'.join(wheel.abi)}, and the machine has {tag}"
    if not set(wheel.system) & {"any", *PLATFORMS}:
        return (
            f"{file} is for {'.'.join(wheel.system)}, and the machine is Linux on x86-64, glibc 2.{GLIBC[0]} or older"
        )
    return ""


def _stable(wheel: Wheel, tag: str) -> bool:
    """abi3: made for an older Python 3, and good for later ones."""
    older = [int(name[3:]) for name in wheel.python if re.fullmatch(r"cp3\d+", name)]
    return "abi3" in wheel.abi and any(minor <= int(tag[3:]) for minor in older)


def check(files: list[str], wanted: tuple[str, ...]) -> None:
    """Raises SystemExit unless `files` are usable wheels, one for each of `wanted`, and no others."""
    if faults := [why for file in files if (why := fault(file))]:
        raise SystemExit("; ".join(faults))
    have, want = sorted(map(_pinned, files)), sorted(map(_plain, wanted))
    if have != want:
        raise SystemExit(f"wheels: wanted {', '.join(want)}; got {', '.join(have) or 'none'}")


def download(folder: Path) -> dict[str, list[Path]]:
    """Fetch the wheels of each archive with pip, unless they are in `folder` already; returns their paths."""
    found = {}
    for archive, wanted in WHEELS.items():
        into = folder / archive
        into.mkdir(parents=True, exist_ok=True)
        have = {_pinned(file.name): file for file in into.glob("*.whl")}
        for pin, file in have.items():
            if pin not in map(_plain, wanted):
                file.unlink()  # of an earlier version
        for each in wanted:
            if _plain(each) not in have:
                _fetch(each, into)
        files = sorted(into.glob("*.whl"))
        check([file.name for file in files], wanted)
        found[archive] = files
    return found


def _fetch(wanted: str, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if wanted.startswith(BUILT):
        command += ["wheel", "--no-deps", "--wheel-dir", str(into), wanted]
    else:
        command += ["download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", PYTHON, "--dest", str(into), wanted]
        for platform in PLATFORMS:
            command += ["--platform", platform]
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip could not fetch {wanted} for Python {PYTHON} on Linux x86-64")


def _pinned(file: str) -> str:
    """'onnxruntime-gpu==1.31.1', of a wheel's name."""
    wheel = parse(file)
    return f"{_plain(wheel.name)}=={wheel.version}"


def _plain(pin: str) -> str:
    """A package's name, or a pin, with the name as the registry compares it."""
    name, equals, version = pin.partition("==")
    return re.sub(r"[-_.]+", "-", name).lower() + equals + version
