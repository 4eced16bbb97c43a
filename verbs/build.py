"""`vega-edge build`: a bundle's graphs to TensorRT or TensorRT-RTX engines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .common import bar, lora

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..export.trt_build import BuildOptions

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
    with bar(1000) as shown:

        def progress(graph: str, share: float, phase: str) -> None:
            shown.set_description_str(f"{graph}: {phase}", refresh=False)
            shown.n = int(share * 1000)
            shown.refresh()

        built = build_engines(
            bundle, options, weights=partial(weights_of, patches), loras=patches.hashes, progress=progress,
            ranges=lambda graph: _ranges(bundle, graph, arguments.lora),
        )  # fmt: skip
    if arguments.json:
        print(json.dumps([{**dataclasses.asdict(each.plan), "built": each.seconds > 0} for each in built], indent=2))
        return
    for each in built:
        done = f"built in {each.seconds:.1f} s" if each.seconds else "there already"
        print(f"{each.plan.graph}: {each.plan.bytes / 1e6:.1f} MB, {done}", file=sys.stderr)
        print(each.plan.file)


def _options(bundle: Bundle, arguments: argparse.Namespace) -> BuildOptions:
    from ..export.trt_build import BuildOptions
    from ..export.trt_profiles import batch_range, bundle_sizes, check_multiple, latent_px, size_range

    sizes = bundle_sizes(bundle)
    if arguments.size:
        width, height = size_range(arguments.size)
        sizes = dataclasses.replace(sizes, width=width, height=height)
        check_multiple(sizes, latent_px(bundle) * 2 ** (bundle.levels("unet") - 1))
    if arguments.batch:
        sizes = dataclasses.replace(sizes, batch=batch_range(arguments.batch))
    if arguments.static:
        sizes = sizes.static()
    flags = tuple(flag.replace("_", "-") for flag in _FLAGS if getattr(arguments, flag))
    return BuildOptions(
        arguments.engine, sizes, tuple(arguments.part), tuple(arguments.target), flags, arguments.precision,
        _gpu(arguments.device),
    )  # fmt: skip


def _gpu(device: str | None) -> int:
    from ..engines import gpu_index

    if device == "cpu":
        raise UsageError("build --device must be cuda or cuda:N, such as cuda:0, not 'cpu'")
    return gpu_index(device)


def _ranges(bundle: Bundle, graph: Path, loras: list[tuple[Path, float]]) -> dict[str, float]:
    """What fp8 is scaled by: the bundle itself draws a few pictures on the CPU, and its UNet is measured on the way."""
    from ..export.trt_calibrate import largest_values
    from ..runtime.calibration import unet_feeds

    return largest_values(graph, unet_feeds(bundle.path, loras))
