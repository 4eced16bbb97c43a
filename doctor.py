"""What `vega-edge doctor` tells: what is installed here, which engines work, why the others do not, and what to do.

Collects facts and writes them down; changes nothing. Imports every backend that it finds, to see whether it works.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import engines
from .bundle import Bundle
from .engines import EngineStatus, compiled, nvidia
from .errors import EngineError
from .manifest import INDEX

PACKAGES = (
    "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx", "tensorrt",
    "cuda-python", "onnx", "torch", "diffusers",
)  # fmt: skip

# Each of these puts its files into the same folder, onnxruntime/.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")


@dataclass(frozen=True)
class BundleFolder:
    path: str
    bundles: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class CacheFolder:
    """Of what engines compiled. limit_bytes: the most that it may hold; limit_reason: why that much."""

    path: str
    entries: int
    bytes: int
    limit_bytes: int
    limit_reason: str

    def __str__(self) -> str:
        most = f"at most {compiled.size_text(self.limit_bytes)}" if self.limit_bytes else "off"
        return f"{self.path}: {compiled.size_text(self.bytes)} in {self.entries} folders, {most} ({self.limit_reason})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Report:
    """What is not there is '': a package's version, the engine for `auto`, `why_no_gpu` where there is a GPU.
    passed_over: the engines that `auto` would rather have taken, each with the reason why not. auto_small: what it takes
    for models whose graphs are below `small_bytes`, such as the one that comes with the package. model: of which all this
    is told, by its folder; '' for any, and then what has to be built of a model counts as not there."""

    version: str
    python: str
    system: str
    cpu: str
    cores: int
    gpus: tuple[str, ...]
    why_no_gpu: str
    packages: dict[str, str]
    engines: tuple[EngineStatus, ...]
    auto: str
    auto_small: str
    small_bytes: int
    passed_over: tuple[str, ...]
    bundle_folders: tuple[BundleFolder, ...]
    warnings: tuple[str, ...]
    model: str = ""
    cache: CacheFolder | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for --json."""
        return dataclasses.asdict(self)


def examine(
    bundle_folders: Iterable[Path] = (),
    model: Path | None = None,
    device: str | None = None,
    unused: frozenset[str] = frozenset(),
    cache: Path | None = None,
) -> Report:
    """`bundle_folders`: where bundles are kept, each with one subfolder a bundle; it need not exist. `model`: a bundle's
    folder; `device`: cpu, cuda or cuda:N, both as they would be drawn with; `unused`: its parts that would not;
    `cache`: where engines keep what they compiled. BundleError where there is no such bundle."""
    gpus, why_no_gpu = _gpus()
    if model is None:
        auto, passed_over = engines.best_engine(device=device)
        auto_small, _ = engines.best_engine(model_bytes=0, device=device)
    else:
        size, precision = sum(f.stat().st_size for f in model.glob("*/*.onnx*")), Bundle.open(model, False).precision
        auto, passed_over = engines.best_engine(size, engines.BuiltFor(model, unused), device, precision)
        auto_small = auto
    no_engine = [] if auto else ['no engine can be used; pip install "vega-edge[cpu]"']
    return Report(
        version=_version("vega-edge"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        gpus=gpus,
        why_no_gpu=why_no_gpu,
        packages={name: _version(name) for name in PACKAGES},
        engines=tuple(engines.available()),
        auto=auto,
        auto_small=auto_small,
        small_bytes=engines.SMALL_BYTES,
        passed_over=tuple(passed_over),
        bundle_folders=tuple(_bundles(folder) for folder in bundle_folders),
        warnings=tuple(_overwritten() + no_engine),
        model=str(model or ""),
        cache=cache_at(cache) if cache else None,
    )


def render(report: Report) -> str:
    """The report as text for people, without a newline at its end."""
    gpus = ", ".join(report.gpus) or f"none: {report.why_no_gpu}"
    lines = [
        f"vega-edge {report.version or '(not installed)'}, Python {report.python}, {report.system}",
        f"CPU: {report.cpu}, {report.cores} logical cores",
        f"GPU: {gpus}",
        "",
        f"Engines (auto takes {_auto(report)})",
        *_columns([_engine_row(state) for state in report.engines]),
        *(f"  auto passes over {engine}" for engine in report.passed_over),
        "",
        "Packages",
        *_columns([(name, version or "-") for name, version in report.packages.items()]),
    ]
    if report.bundle_folders:
        lines += ["", "Bundles", *(f"  {_bundle_line(folder)}" for folder in report.bundle_folders)]
    if report.cache:
        lines += ["", "Compiled cache", f"  {report.cache}"]
    if report.warnings:
        lines += ["", *(f"WARNING: {warning}" for warning in report.warnings)]
    return "\n".join(lines)


def _auto(report: Report) -> str:
    if report.auto_small == report.auto:
        return f"{report.auto or 'none'}{f' for {report.model}' if report.model else ''}"
    return f"{report.auto}; {report.auto_small} for models below {report.small_bytes / 1e6:.0f} MB"


def _engine_row(state: EngineStatus) -> tuple[str, str, str]:
    if state.ok:
        return state.name, "ok", f"{state.version} on {state.device}"
    return state.name, "no", "; ".join(text for text in (state.why_not, state.install) if text)


def _bundle_line(folder: BundleFolder) -> str:
    return f"{folder.path}: {', '.join(folder.bundles) or 'none'} ({folder.bytes / 1e6:.1f} MB)"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _overwritten() -> list[str]:
    there = [name for name in ONNXRUNTIMES if _version(name)]
    if len(there) < 2:
        return []
    return [
        f"{' and '.join(there)} are both installed and overwrite each other's files: pip uninstall {' '.join(there)}, "
        'then pip install "vega-edge[cuda]" for an NVIDIA GPU or "vega-edge[cpu]"'
    ]


def _gpus() -> tuple[tuple[str, ...], str]:
    try:
        return tuple(nvidia.devices()), ""
    except EngineError as failure:
        return (), str(failure)


def cpu_name() -> str:
    """The processor's name. On Linux it is in /proc only; platform.processor() is empty or the architecture there."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _bundles(folder: Path) -> BundleFolder:
    bundles = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    files = (file for bundle in bundles for file in bundle.rglob("*") if file.is_file())
    return BundleFolder(str(folder), tuple(path.name for path in bundles), sum(file.stat().st_size for file in files))


def cache_at(folder: Path) -> CacheFolder:
    """UsageError where VEGA_EDGE_CACHE_GB is no number."""
    kept, limit = compiled.contents(folder), compiled.limit(folder)
    return CacheFolder(str(folder), len(kept), sum(each.bytes for each in kept), limit.bytes, limit.reason)
