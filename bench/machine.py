"""What every result is recorded with: the device, the versions, the commit, the date; and a table's text."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..doctor import cpu_name

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "cuda-python", "tokenizers", "torch",
    "diffusers", "transformers",
)  # fmt: skip

# x86: matrix units, 16-bit floats, 8-bit integers. Arm's names are asimddp, bf16, i8mm, sve.
FLAGS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def facts(commit: bool = True) -> dict[str, Any]:
    """commit: of the checkout that this file is in; an installed package has none."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        **({"commit": _commit()} if commit else {}),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_flags() -> list[str]:
    """Return the instruction sets of this CPU that decide which arithmetic is fast. Empty where Linux's /proc is absent."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    has = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}
    return [flag for flag in FLAGS if flag in has]


def peak_mb(children: bool = False) -> float:
    """The largest resident memory so far, in MB, of this process or of the largest of its children that have ended; file
    pages that are mapped count."""
    if sys.platform == "win32":
        raise SystemExit("this measurement needs a POSIX system: peak memory is read as getrusage tells it")
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _commit() -> str:
    """Empty without git, or in a copy of the files alone."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that reads well as text too."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(max(3, w)) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
