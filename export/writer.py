"""`export_bundle`: a local diffusers folder to a bundle, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle import describe_files, write_manifest
from ..errors import BundleError, ExportError, unknown
from ..lora import LoraLayer, match_lora, read_lora
from ..manifest import MANIFEST, ROOT_PART, Lora, Manifest, Part, Source
from .checkpoint import Checkpoint
from .packages import require
from .report import ExportReport, PartReport, Progress
from .sources import ModelSource, path_source

if TYPE_CHECKING:
    from .parts import Exported

DTYPES = ("fp32", "fp16")
_NEEDED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
_WITHOUT_GRAPH = ("feature_extractor", "image_encoder", "scheduler", "tokenizer", "tokenizer_2")
Layers = Mapping[str, Mapping[str, Sequence[tuple[LoraLayer, float]]]]


@dataclass(frozen=True)
class _Request:
    """The arguments of export_bundle, checked."""

    source: ModelSource
    out: Path
    loras: tuple[tuple[Path, float], ...]
    dtype: str
    weights: str
    name: str


def export_bundle(
    source: Path | ModelSource,
    out: Path,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    dtype: str = "fp32",
    weights: str | None = None,
    tiny_vae: Path | None = None,
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    overwrite: bool = False,
) -> ExportReport:
    """Export `source`, a path (see `model_source`) or what else `sources` knows, to the bundle `out`.

    loras: (file, strength), fused into the weights in this order; strength 1 is as trained. dtype: of the graphs'
    arithmetic; weights: of their storage (default: as dtype; fp16 with dtype fp32 halves the files and keeps full
    arithmetic). tiny_vae: an AutoencoderTiny's folder, for the decoder. name: the bundle's, default `out`'s.
    defaults, limits: go into the manifest as they are. Every part is compared with torch on real inputs.

    Raises ExportError (UsageError for dtype and weights) with one line that says what to do. Whatever happens, Ctrl-C
    included, `out` is either whole or as it was: all is written to a folder beside it, and renamed at the end.
    """
    start = time.monotonic()
    request = _checked(source, out, loras, dtype, weights, name, overwrite)
    checkpoint = request.source.open(tiny_vae)
    layers = _match_loras(checkpoint, request.loras)
    require(*_NEEDED)
    with _staging(request.out, overwrite) as folder:
        done, notes = _export_parts(checkpoint, folder, request, layers, progress)
        _copy_configs(checkpoint, folder)
        manifest = _manifest(request, folder, done, "tiny" if tiny_vae else "full", defaults or {}, limits or {})
        write_manifest(folder, manifest)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    parts: tuple[PartReport, ...] = tuple(part.report for part in done.values())
    return ExportReport(out, parts, size, time.monotonic() - start, (*_left_out(checkpoint), *notes))


def _checked(
    source: Path | ModelSource,
    out: Path,
    loras: Sequence[tuple[Path, float]],
    dtype: str,
    weights: str | None,
    name: str | None,
    overwrite: bool,
) -> _Request:
    for kind, value in (("dtype", dtype), ("weights", weights or dtype)):
        if value not in DTYPES:
            raise unknown(kind, value, DTYPES)
    if dtype == "fp16" and weights == "fp32":
        raise ExportError("weights fp32 with dtype fp16 would store digits that are never used; leave weights out")
    for path, strength in loras:
        if not math.isfinite(strength):
            raise ExportError(f"LoRA {path}: its strength is {strength}; it must be a finite number, 1 is as trained")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists already; choose another folder, or ask to overwrite it")
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is no bundle of ours, so it is not overwritten; choose another folder")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out} can't be made: {out.absolute().parent} does not exist; create that folder first")
    return _Request(
        source if isinstance(source, ModelSource) else path_source(source),
        out,
        tuple(loras),
        dtype,
        weights or dtype,
        name or out.name,
    )


def _match_loras(checkpoint: Checkpoint, loras: Sequence[tuple[Path, float]]) -> Layers:
    """part -> weight -> its layers with their strengths, several where LoRAs meet."""
    layers: dict[str, dict[str, list[tuple[LoraLayer, float]]]] = {}
    if not loras:
        return layers
    shapes = {part: checkpoint.weight_shapes(part) for part in checkpoint.parts if "vae" not in part}
    for path, strength in loras:
        for part, by_name in match_lora(read_lora(path), shapes).items():
            for weight, layer in by_name.items():
                layers.setdefault(part, {}).setdefault(weight, []).append((layer, strength))
    return layers


@contextlib.contextmanager
def _staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        folder.mkdir()
    except OSError as failure:
        raise ExportError(
            f"{out} can't be made ({failure.strerror}); choose a folder that you may write to"
        ) from failure
    try:
        yield folder
        _move_into_place(folder, out, overwrite)
    except (OSError, BundleError) as failure:
        cause = failure if isinstance(failure, OSError) else failure.__cause__
        if isinstance(cause, OSError):
            raise ExportError(_why_not_written(out, cause)) from failure
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already if it became `out`


def _why_not_written(out: Path, failure: OSError) -> str:
    # numpy's tofile says "3 requested and 0 written", without an errno
    full = failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or (failure.errno is None and shutil.disk_usage(out.parent).free < 1 << 20):
        return f"disk full while exporting to {out}; free some space: nothing was left behind"
    return f"{out} can't be written: {failure.strerror or failure}; nothing was left behind"


def _move_into_place(folder: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ExportError(f"{out} was made by another process meanwhile; choose another folder, or ask to overwrite it")
    old = folder.with_suffix(".old")
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _export_parts(
    checkpoint: Checkpoint, folder: Path, request: _Request, layers: Layers, progress: Callable[[Progress], None]
) -> tuple[dict[str, Exported], list[str]]:
    from .parts import PHASES, PartsExporter, Precision  # torch, here and not before

    count = len([part for part in checkpoint.parts if part != "tiny_vae"]) * len(PHASES)
    seen = iter(range(1, count + 1))
    exporter = PartsExporter(
        checkpoint,
        folder,
        Precision(request.dtype, request.weights),
        layers,
        lambda part, phase: progress(Progress(part, phase, next(seen), count)),
    )
    return exporter.run(), exporter.notes


def _copy_configs(checkpoint: Checkpoint, folder: Path) -> None:
    """The files that diffusers writes, unchanged: facts about the model stay where other tools look for them."""
    shutil.copyfile(checkpoint.path / "model_index.json", folder / "model_index.json")
    (folder / "scheduler").mkdir()
    shutil.copyfile(
        checkpoint.path / "scheduler" / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json"
    )
    for part, source in checkpoint.parts.items():  # the tiny autoencoder comes last and replaces the full one's
        shutil.copyfile(source / "config.json", folder / ("vae_decoder" if "vae" in part else part) / "config.json")


def _manifest(
    request: _Request,
    folder: Path,
    done: Mapping[str, Exported],
    vae: str,
    defaults: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> Manifest:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    parts = {ROOT_PART: Part(describe_files(folder, ROOT_PART))}
    for name in names:
        exported = done.get(name)
        error = exported.report.max_relative_error if exported else None
        parts[name] = Part(describe_files(folder, name), error, (exported.parameters or None) if exported else None)
    loras = tuple(Lora(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), float(s)) for path, s in request.loras)
    return Manifest(
        name=request.name,
        created_by=f"vega-edge {__version__}",
        dtype=request.dtype,  # type: ignore[arg-type]  # checked to be one of DTYPES
        weights=request.weights,  # type: ignore[arg-type]
        source=Source(request.source.name, loras, vae, request.source.random_weights),  # type: ignore[arg-type]
        defaults=defaults,
        limits=limits,
        parts=parts,
    )


def _left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """Parts of the checkpoint that a bundle has no place for, such as a safety checker."""
    for name, value in checkpoint.model_index.items():
        if isinstance(value, list) and any(value) and name not in (*checkpoint.parts, *_WITHOUT_GRAPH):
            yield f"{name} is not exported: a bundle has no such part"
