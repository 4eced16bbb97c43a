"""`export_bundle`: a model's checkpoint, wherever it is, to a bundle, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle import describe_files, write_manifest
from ..errors import ExportError, UsageError, unknown
from ..lora import LoraLayer, match_lora, read_lora
from ..manifest import FORMAT, MANIFEST, ROOT_PART, FileEntry, Lora, Manifest, Part, Source
from ..whole_file import sha256_of
from .checkpoint import Checkpoint
from .heap import map_tensors
from .needs import bundle_parts, check_room
from .packages import require
from .precision import Precision, make_precision
from .quiet import no_compiler_folder
from .records import Records, fingerprint
from .report import ExportReport, PartReport, Progress
from .sources import ModelSource, Place, lora_file, path_source, tiny_vae_folder
from .staging import staging

if TYPE_CHECKING:
    from .work import Exported

_NEEDED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "filelock", "psutil")
_MAKERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")  # a graph depends on their versions
_WITHOUT_GRAPH = ("feature_extractor", "image_encoder", "scheduler", "tokenizer", "tokenizer_2")
Layers = Mapping[str, Mapping[str, Sequence[tuple[LoraLayer, float]]]]


@dataclass(frozen=True)
class _Request:
    """The arguments of export_bundle, checked."""

    source: ModelSource
    out: Path
    loras: tuple[tuple[Path, float], ...]  # fetched
    precision: Precision
    vae: str
    name: str


@no_compiler_folder()
def export_bundle(
    source: Path | ModelSource,
    out: Path,
    *,
    loras: Sequence[tuple[Place, float]] = (),
    dtype: str = "fp32",
    weights: str | None = None,
    tiny_vae: Place | None = None,
    vae: str = "full",
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    overwrite: bool = False,
) -> ExportReport:
    """Export `source`, a path (see `model_source`) or what else `sources` knows, to the bundle `out`.

    loras: (file, or where it is on the hub; strength), fused into the weights in this order; strength 1 is as trained.
    dtype: of the graphs' arithmetic; weights: of their storage (see `precision`; default: as dtype; fp16 with dtype fp32
    halves the files and keeps full arithmetic). tiny_vae: an AutoencoderTiny's folder. vae: "full" puts it beside the
    full decoder, for previews; "tiny" in its place. name: the bundle's, default `out`'s. defaults, limits: go into the
    manifest as they are. Every part is compared with torch on real inputs.

    Raises ExportError (UsageError for dtype and weights) with one line that says what to do. Whatever happens, Ctrl-C
    included, `out` is either whole or as it was: all is written to a folder beside it, and renamed at the end. A
    process that is killed leaves that folder; the next export of the same goes on from the parts that are whole.
    """
    start = time.monotonic()
    precision = make_precision(dtype, weights)
    found = replace(_checked(source, out, loras, precision, vae, overwrite), defaults=defaults or {})
    if vae == "tiny" and tiny_vae is None:
        raise UsageError("vae tiny needs a tiny autoencoder; say its folder: --tiny-vae FOLDER")
    _require(precision)
    map_tensors()
    files = tuple((lora_file(place), strength) for place, strength in loras)
    tiny = None if tiny_vae is None else tiny_vae_folder(tiny_vae, allow_pickle=found.allow_pickle)
    request = _Request(found, out, files, precision, vae, name or out.name)
    checkpoint = found.open(tiny)
    layers = _match_loras(checkpoint, request.loras)
    with staging(request.out, overwrite) as folder:
        records = Records(folder, _key(checkpoint, request))
        done, notes = _export_parts(checkpoint, folder, request, layers, progress, records)
        _copy_configs(checkpoint, folder, vae)
        records.remove()
        write_manifest(folder, _manifest(request, folder, done, defaults or {}, limits or {}))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    parts: tuple[PartReport, ...] = tuple(part.report for part in done.values())
    return ExportReport(out, parts, size, time.monotonic() - start, (*_left_out(checkpoint), *notes))


def _checked(
    source: Path | ModelSource,
    out: Path,
    loras: Sequence[tuple[Place, float]],
    precision: Precision,
    vae: str,
    overwrite: bool,
) -> ModelSource:
    """What can be refused before anything is fetched or opened."""
    if vae not in ("full", "tiny"):
        raise unknown("vae", vae, ("full", "tiny"))
    for path, strength in loras:
        if not math.isfinite(strength):
            raise ExportError(f"LoRA {path}: its strength is {strength}; it must be a finite number, 1 is as trained")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists already; choose another folder, or pass --overwrite")
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is no bundle of ours, so it is not overwritten; choose another folder")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out} can't be made: {out.absolute().parent} does not exist; create that folder first")
    return source if isinstance(source, ModelSource) else path_source(source)


def _require(precision: Precision) -> None:
    require(*_NEEDED)
    if precision.dtype == "bf16" and importlib.util.find_spec("openvino") is None:
        raise ExportError(
            "an export with dtype bf16 is compared with torch on openvino, which is not installed; install: "
            'pip install "vega-edge[openvino]"'
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


def _key(checkpoint: Checkpoint, request: _Request) -> str:
    """What decides the graphs' bytes: sources, options, versions."""
    versions = {name: importlib.metadata.version(name) for name in _MAKERS}
    told = {
        "format": FORMAT, "versions": versions | {"vega-edge": __version__}, "source": fingerprint(checkpoint),
        "loras": [(sha256_of(path), strength) for path, strength in request.loras],
        "precision": [request.precision.dtype, request.precision.weights], "vae": request.vae,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _export_parts(
    checkpoint: Checkpoint,
    folder: Path,
    request: _Request,
    layers: Layers,
    progress: Callable[[Progress], None],
    records: Records,
) -> tuple[dict[str, Exported], list[str]]:
    from .parts import PHASES, PartsExporter  # torch, here and not before

    parts = bundle_parts(checkpoint, request.vae)
    left = [part for part in parts if records.load(part) is None]
    check_room(checkpoint, request.precision, left, request.out)
    count = len(left) * len(PHASES)
    seen = iter(range(1, count + 1))
    exporter = PartsExporter(
        checkpoint,
        folder,
        request.precision,
        layers,
        lambda part, phase: progress(Progress(part, phase, next(seen), count)),
        records,
        request.vae,
    )
    return exporter.run(), exporter.notes


def _copy_configs(checkpoint: Checkpoint, folder: Path, vae: str) -> None:
    """The files that diffusers writes, unchanged: facts about the model stay where other tools look for them."""
    shutil.copyfile(checkpoint.path / "model_index.json", folder / "model_index.json")
    (folder / "scheduler").mkdir()
    shutil.copyfile(
        checkpoint.path / "scheduler" / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json"
    )
    sources = {
        "vae_encoder": "vae",
        "vae_decoder": "tiny_vae" if vae == "tiny" else "vae",
        "tiny_vae_decoder": "tiny_vae",
    }
    for part in bundle_parts(checkpoint, vae):
        shutil.copyfile(checkpoint.parts[sources.get(part, part)] / "config.json", folder / part / "config.json")


def _manifest(
    request: _Request,
    folder: Path,
    done: Mapping[str, Exported],
    defaults: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> Manifest:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    parts = {ROOT_PART: Part(describe_files(folder, ROOT_PART))}
    for name in names:
        files = describe_files(folder, name)
        parts[name] = _part(files, done[name], request.precision) if name in done else Part(files)
    loras = tuple(Lora(path.name, sha256_of(path), float(s)) for path, s in request.loras)
    return Manifest(
        name=request.name,
        created_by=f"vega-edge {__version__}",
        dtype=request.precision.dtype,  # type: ignore[arg-type]  # checked to be one of DTYPES
        weights=request.precision.weights,  # type: ignore[arg-type]
        source=Source(request.source.name, loras, request.vae, request.source.random_weights),  # type: ignore[arg-type]
        defaults=defaults,
        limits=limits,
        parts=parts,
    )


def _part(files: Mapping[str, FileEntry], exported: Exported, bundle: Precision) -> Part:
    report, scale = exported.report, exported.activation_scale
    return Part(
        files,
        report.max_relative_error,
        exported.parameters or None,
        None if report.dtype == bundle.dtype else report.dtype,  # type: ignore[arg-type]
        None if report.weights == bundle.weights else report.weights,  # type: ignore[arg-type]
        None if scale == 1 else scale,
    )


def _left_out(checkpoint: Checkpoint) -> Iterator[str]:
    """Parts of the checkpoint that a bundle has no place for, such as a safety checker."""
    for name, value in checkpoint.model_index.items():
        if isinstance(value, list) and any(value) and name not in (*checkpoint.parts, *_WITHOUT_GRAPH):
            yield f"{name} is not exported: a bundle has no such part"
