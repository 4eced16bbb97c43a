"""`vega-edge build`: a bundle's graphs to TensorRT or TensorRT-RTX engines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .common import bar, lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..bundle import Bundle
    from ..engines.plan_store import Plan
    from ..export.trt_build import BuildOptions, BuiltEngine

_FLAGS = ("static", "refit", "stripped", "weight_streaming")


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", help="a model's name, or a bundle's folder")
    p.add_argument("--engine", required=True, metavar="NAME", help="tensorrt-rtx (needs no GPU to build) or tensorrt")
    p.add_argument(
        "--part", action="append", default=[], metavar="PART", help="such as unet; may be repeated; default: all"
    )
    p.add_argument(
        "--size", metavar="MIN:BEST:MAX", help="sides in px, such as 512:1024:1024 or 768x512; default: the model's"
    )
    p.add_argument("--batch", metavar="MIN:BEST:MAX", help="pictures at once; default: 1:1:4")
    p.add_argument("--static", action="store_true", help="the best size and batch only: fastest, and nothing else runs")
    p.add_argument(
        "--target", action="append", default=[], metavar="sm_XY",
        help="of tensorrt-rtx, may be repeated: sm_86, ...; sm_75 (Turing) is an engine of its own; default: every RTX GPU from Ampere on",
    )  # fmt: skip
    p.add_argument(
        "--device", metavar="NAME", help="cuda or cuda:N, the GPU to build on where one is needed; default: cuda:0"
    )
    p.add_argument(
        "--precision", default="graph", help="graph (as exported), int8 (weights only) or fp8; default: graph"
    )
    p.add_argument("--lora", type=lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    p.add_argument(
        "--refit", action="store_true", help="weights can be replaced later; tensorrt-rtx needs a GPU for it"
    )
    p.add_argument(
        "--stripped", action="store_true",
        help="without the weights, which are read from the bundle; with --refit too it takes LoRAs",
    )  # fmt: skip
    p.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory while it runs")
    p.add_argument("--json", action="store_true", help="print the engines as JSON")
    p.add_argument("-v", "--verbose", action="store_true", help="print what the library says")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ..bundle import Bundle
    from ..export.trt_build import build_engines
    from ..models import find_bundle
    from ..runtime.parts import weights_of
    from ..runtime.patches import Patches

    bundle = Bundle.open(find_bundle(arguments.bundle))
    options = _options(bundle, arguments)
    patches = Patches(bundle, arguments.lora)
    with _sigterm_as_ctrl_c(), bar(1000) as shown:
        shown.bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}"  # the time goes on where the share does not

        def progress(graph: str, share: float, phase: str) -> None:
            shown.set_description_str(f"{graph}: {phase}", refresh=False)
            shown.n = int(share * 1000)
            shown.refresh()

        built = build_engines(
            bundle, options, weights=partial(weights_of, patches), loras=patches.hashes, progress=progress,
            ranges=lambda graph: _ranges(bundle, graph, arguments.lora, progress),
        )  # fmt: skip
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(each.plan), "built": each.seconds > 0} for each in built], indent=2))
        return
    for graph in _passed_over(bundle, built):
        print(
            f"vega-edge: {graph}: an engine as exact as the graph is there too, and goes before; to use this one: "
            f"vega-edge engines rm {bundle.path} FILE", file=sys.stderr,
        )  # fmt: skip
    if bundle.manifest is not None and bundle.manifest.dtype == "fp32":
        print(
            "vega-edge: this bundle calculates in fp32, and so do its engines; those of an export with --dtype fp16 are "
            "half as large", file=sys.stderr,
        )  # fmt: skip
    for each in built:
        done = f"built in {each.seconds:.1f} s" if each.seconds else "there already"
        print(f"{each.plan.graph}: {each.plan.bytes / 1e6:.1f} MB, {done}", file=sys.stderr)
        print(each.plan.file)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A container or a service that is stopped leaves nothing half built either."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _passed_over(bundle: Bundle, built: Sequence[BuiltEngine]) -> list[str]:
    """The graphs whose plans of fewer bits, asked for now, are not those that will run."""
    from ..engines.plan_store import PlanStore

    exact = [plan for plan in PlanStore(bundle.path).plans() if plan.precision == "graph"]
    plans = [each.plan for each in built if each.plan.precision != "graph"]
    return [plan.graph for plan in plans if any(_goes_before(other, plan) for other in exact)]


def _goes_before(exact: Plan, plan: Plan) -> bool:
    """On every GPU that `plan` is for."""
    from ..export.trt_library import AMPERE_PLUS, TURING

    def same(p: Plan) -> tuple[object, ...]:
        return p.graph, p.graph_hash, p.library, p.version, p.loras

    covers = {*plan.targets} <= {*exact.targets} or (AMPERE_PLUS in exact.targets and TURING not in plan.targets)
    return same(exact) == same(plan) and covers


def _options(bundle: Bundle, arguments: argparse.Namespace) -> BuildOptions:
    from ..export.trt_build import BuildOptions
    from ..export.trt_profiles import batch_range, bundle_sizes, check_multiple, check_sides, latent_px, size_range
    from ..runtime.request import Limits

    sizes = bundle_sizes(bundle)
    if arguments.size:
        width, height = size_range(arguments.size)
        sizes = dataclasses.replace(sizes, width=width, height=height)
        multiple = latent_px(bundle) * 2 ** (bundle.levels("unet") - 1)
        check_multiple(sizes, multiple)
        check_sides(sizes, *Limits.of(bundle.manifest.limits if bundle.manifest else {}, multiple).size_px)
    if arguments.batch:
        sizes = dataclasses.replace(sizes, batch=batch_range(arguments.batch))
    if arguments.static:
        sizes = sizes.static()
    flags = tuple(flag.replace("_", "-") for flag in _FLAGS if getattr(arguments, flag))
    return BuildOptions(
        arguments.engine, sizes, tuple(arguments.part), tuple(arguments.target), flags, arguments.precision,
        _gpu(arguments),
    )  # fmt: skip


def _gpu(arguments: argparse.Namespace) -> int:
    from ..engines import gpu_index

    if arguments.device == "cpu":
        raise UsageError("build --device must be cuda or cuda:N, such as cuda:0, not 'cpu'")
    index = gpu_index(arguments.device)
    if arguments.device and arguments.engine == "tensorrt-rtx" and not (arguments.refit or arguments.stripped):
        raise UsageError("build --engine tensorrt-rtx needs no GPU, but for --refit and --stripped: leave --device out")
    return index


def _ranges(
    bundle: Bundle, graph: Path, loras: list[tuple[Path, float]], progress: Callable[[str, float, str], None]
) -> dict[str, float]:
    """What fp8 is scaled by: the bundle itself draws a few pictures on the CPU, and its UNet is measured on the way."""
    from ..export.trt_calibrate import Measured
    from ..runtime.calibration import draw_with

    def drawn(share: float) -> None:
        progress(f"{graph.parent.name}/{graph.name}", share, "drawing pictures to measure")

    measured = Measured(graph)
    draw_with(measured, bundle.path, loras, drawn)
    return measured.largest()
