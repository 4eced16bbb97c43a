"""`build_engines`: a bundle's graphs to plans in the folder beside it, those that are there already not again.

Knows no LoRA: weights that a LoRA changed come from the caller, ready.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle
from ..engines import nvidia
from ..engines.cuda import free_bytes
from ..engines.plan_choice import RUN_GRAPHS
from ..engines.plan_store import REVISION, Plan, PlanLora, PlanStore, graph_hash, part_of
from ..errors import EngineError, NotEnoughMemoryError, UsageError, unknown
from ..runtime import memory
from ..runtime.footprint import scores
from .trt_child import build_apart
from .trt_graph import Ranges, prepared
from .trt_library import Library, check_targets, load_library
from .trt_network import Job, Progress, read_inputs
from .trt_profiles import Sizes, check_inputs, latent_px, profile, unit_px
from .trt_ranges import kept_ranges

Weights = Mapping[str, NDArray[Any]]
QUANTIZED_PARTS = {"graph": (), "int8": ("unet", "text_encoder"), "fp8": ("unet",)}


@dataclass(frozen=True)
class BuildOptions:
    """library: tensorrt-rtx or tensorrt. parts: of the bundle; none is all. targets: none is the library's default.

    flags: static, refit, stripped, weight-streaming. precision: graph (as the graph says), int8 (weights of the UNet's
    and text encoders' matrix products) or fp8 (the UNet's); the other parts stay as their graphs say. gpu: to build on,
    where one is needed.
    """

    library: str
    sizes: Sizes
    parts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    precision: str = "graph"
    gpu: int = 0


@dataclass(frozen=True)
class BuiltEngine:
    """`seconds` is 0 where the plan was there already."""

    plan: Plan
    seconds: float


def graphs(bundle: Bundle, parts: Sequence[str] = ()) -> list[str]:
    """'unet/model.onnx', ... in the order in which a pipeline needs them. UsageError for a part without a graph."""
    found = {}
    for part in bundle.parts:
        names = [f"{part}/{name}" for name in RUN_GRAPHS if bundle.has(f"{part}/{name}")]
        if names:
            found[part] = names[0]
    for part in parts:
        if part not in found:
            raise unknown("part", part, found)
    return [found[part] for part in sorted(found) if not parts or part in parts]


def build_engines(
    bundle: Bundle,
    options: BuildOptions,
    *,
    weights: Callable[[str], Weights] = lambda part: {},
    loras: Sequence[tuple[str, float]] = (),
    ranges: Callable[[Path], Ranges] = lambda graph: {},
    progress: Callable[[str, float, str], None] = lambda graph, share, phase: None,
) -> list[BuiltEngine]:
    """Builds what is not there. `weights`: part -> initializers that `loras`, (sha256, strength) each, change; looked at
    only for a build, since the LoRAs tell whether there is one already.

    ranges: a graph's file, which has the weights that the LoRA changed -> ranges for fp8, see `prepared`. Raises UsageError, EngineError, and KeyboardInterrupt after Ctrl-C;
    plans that were ready by then stay.
    """
    library = load_library(options.library)
    _check_flags(library, options)
    targets = check_targets(library, options.targets, options.precision, options.gpu)
    store, scale, built = PlanStore(bundle.path), latent_px(bundle), []
    for graph in graphs(bundle, options.parts):
        part = part_of(graph)
        replaced = weights(part)
        assert loras or not replaced, "their plan would pass for the one without"
        precision = options.precision if part.startswith(QUANTIZED_PARTS[options.precision]) else "graph"
        path = bundle.file(graph)
        inputs = read_inputs(library, path)
        check_inputs(graph, part, inputs)
        wanted = Plan(
            file="", sha256="", bytes=0, graph=graph, graph_hash=graph_hash(path), library=library.name,
            version=library.version, targets=targets, precision=precision, flags=tuple(sorted(options.flags)),
            profile=profile(part, inputs, options.sizes, scale),
            loras=tuple(PlanLora(*lora) for lora in loras) if replaced else (), unit_px=unit_px(part, scale),
            pictures=tuple(options.sizes.batch), revision=REVISION,
        )  # fmt: skip
        if there := _find(store, wanted):  # told where nothing may be written, too
            built.append(BuiltEngine(there, 0.0))
            continue
        with store.building(wanted.key) as folder:  # another process that wants the same plan waits, and then finds it
            there = _find(store, wanted)
            if there is not None:
                built.append(BuiltEngine(there, 0.0))
                continue
            if part == "unet":
                check_scores(bundle, options)
            measured: Ranges = {}
            if precision == "fp8":
                measured = kept_ranges(store, wanted, partial(_measure, path, part, weights, ranges, folder))
            # made anew, so that nobody holds them: they would be a copy of the network beside the library's
            with prepared(path, weights(part), precision, folder, measured) as source:
                job = _job(store, wanted, library, source, options.gpu)
                built.append(_build(store, wanted, job, folder, lambda s, p, g=graph: progress(g, s, p)))  # type: ignore[misc]
    return built


def check_scores(bundle: Bundle, options: BuildOptions) -> None:
    """Raise NotEnoughMemoryError if a U-Net's attention in fp32 is too large to build.

    TensorRT-RTX fuses attention in fp16. In fp32 it runs each layer for real, with all scores of the largest shape in
    memory: 69 GB for Tiny-SD up to 1024 px, 4 images with guidance. Not in an int8 graph, whose scores are fp32 too: one
    of 4.3 GB of scores was built with 1.3 GB of memory. A bundle without a manifest is taken for fp32.
    """
    free = memory.free_bytes()
    if options.library != "tensorrt-rtx" or free is None:
        return
    if bundle.manifest is not None and bundle.manifest.dtype != "fp32":
        return
    sizes, scale = options.sizes, latent_px(bundle)
    pixels = sizes.width.most * sizes.height.most // scale**2
    needed = 4 * sizes.batch.most * sizes.guided.most * scores(bundle.config("unet"), pixels, sizes.tokens.most)
    if needed > free:
        shape = f"{sizes.width.most}x{sizes.height.most} px, {sizes.batch.most} images"
        raise NotEnoughMemoryError(
            f"{bundle.path}: attention in fp32 up to {shape} takes {needed / 1e9:.1f} GB to build with tensorrt-rtx, "
            f"{free / 1e9:.1f} GB of memory are free; export the bundle with --dtype fp16, or build for less: "
            "--size, --batch"
        )


def _measure(
    graph: Path, part: str, weights: Callable[[str], Weights], ranges: Callable[[Path], Ranges], folder: Path
) -> Ranges:
    with prepared(graph, weights(part), "graph", folder) as calibrated:  # with the LoRA's weights
        return ranges(calibrated)


def _job(store: PlanStore, wanted: Plan, library: Library, source: Path, gpu: int) -> Job:
    timing = _timing(store, wanted)
    known = timing.read_bytes() if timing.is_file() else b""
    # TensorRT's own limit is all of the GPU's memory, which on a Jetson is what the builder itself runs in.
    workspace = 0 if library.portable else free_bytes(gpu) // 2
    return Job(library, source, wanted.profile, wanted.targets, wanted.flags, known, gpu, workspace)


def _timing(store: PlanStore, wanted: Plan) -> Path:
    name = f"{wanted.library}-{wanted.version}-{'-'.join(wanted.targets)}-{part_of(wanted.graph)}"  # two parts may be built at once
    return store.folder / f"{name}.timing"


def _build(store: PlanStore, wanted: Plan, job: Job, folder: Path, progress: Progress) -> BuiltEngine:
    start = time.monotonic()
    timing = build_apart(job, folder / "plan", progress)
    if timing:
        store.write(_timing(store, wanted), timing)
    seconds = time.monotonic() - start
    listed = store.add(wanted, folder / "plan", seconds)
    return BuiltEngine(listed, seconds)


def _find(store: PlanStore, wanted: Plan) -> Plan | None:
    for plan in store.plans():
        if plan.key == wanted.key:
            with contextlib.suppress(EngineError):  # missing or altered: built again
                store.check(plan)
                return plan
    return None


def _check_flags(library: Library, options: BuildOptions) -> None:
    # NVIDIA's guide to refitting in 11.3: a product's bias may be dropped and taken as 0, also where nothing is refitted.
    if "refit" in options.flags and library.name == "tensorrt" and library.version.startswith("11.3."):
        raise EngineError(
            f"tensorrt {library.version} draws wrong pictures with engines built with --refit (a known issue of 11.3): install "
            "another version, or build without it: for a LoRA, build with --lora"
        )
    changeable = [flag for flag in options.flags if flag in ("refit", "stripped")]
    if changeable and options.precision != "graph":
        raise UsageError(
            f"--{changeable[0]} puts in the weights of the bundle's graph, which are not {options.precision}: leave one of "
            "the two out"
        )
    if changeable and library.portable:
        try:
            nvidia.compute_capability(options.gpu)
        except EngineError as failure:
            raise EngineError(
                f"--{changeable[0]} with {library.name} needs a GPU to build on, and {failure}; build without it: for a "
                "LoRA, build with --lora, which takes as long"
            ) from failure
