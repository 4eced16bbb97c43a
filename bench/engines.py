"""What building engines costs, as `vega-edge build` does it: seconds, processor seconds and peak memory of each part.

    python -m vega_edge.bench.engines BUNDLE [BUNDLE ...] --engine tensorrt-rtx -o benchmarks/results/engines.json

    python -m vega_edge.bench.engines BUNDLE --lora-rank 128 -o benchmarks/results/engines-lora.json

The second builds the U-Net alone, as it is and then with a LoRA of random numbers over the kinds of module that VegaRT's
touches: reading it, patching the weights and writing them down count; making the LoRA does not.

int8 and fp8 are of the parts that have them. What fp8 is scaled by is made up here, 1 for every tensor, since it changes
no kernel; a real build measures it first, on pictures that the bundle draws on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ..bundle import Bundle
from ..export.trt_build import QUANTIZED_PARTS, graphs
from ..export.trt_child import build_apart
from ..export.trt_graph import matrix_products, prepared
from ..export.trt_library import PRECISIONS, check_targets, load_library
from ..export.trt_network import Job, read_inputs
from ..export.trt_profiles import bundle_sizes, latent_px, profile
from ..models import find_bundle
from ..runtime.patches import Patches
from .lora import random_lora
from .machine import facts, markdown, peak_mb

FP8_TARGETS = ("sm_89", "sm_120")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="models' names or bundles' folders")
    parser.add_argument("--engine", default="tensorrt-rtx")
    parser.add_argument("--part", action="append", default=[])
    parser.add_argument(
        "--precision", action="append", default=[], choices=PRECISIONS, help="may be repeated; default: all"
    )
    parser.add_argument(
        "--lora-rank", type=int, default=0, metavar="RANK", help="the U-Net alone, without and with a LoRA"
    )
    parser.add_argument("--graph", help=argparse.SUPPRESS)  # one build, in this process
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    bundles = [find_bundle(name) for name in arguments.bundles]
    if arguments.graph:
        (precision,) = arguments.precision
        print(json.dumps(build_here(bundles[0], arguments.graph, arguments.engine, precision, arguments.lora_rank)))
        return
    if arguments.lora_rank:
        runs = [(["unet"], "graph", 0), (["unet"], "graph", arguments.lora_rank)]
    else:
        runs = [(arguments.part, precision, 0) for precision in arguments.precision or PRECISIONS]
    rows = [row for bundle in bundles for run in runs for row in measure(bundle, arguments.engine, *run)]
    library = load_library(arguments.engine)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {**facts(), "library": f"{library.name} {library.version}", "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = ("bundle", "graph", "precision", "LoRA's rank", "engine MB", "seconds", "processor seconds", "peak GB")
    columns = ("bundle", "graph", "precision", "lora_rank", "mb", "seconds", "cpu_s", "peak_gb")
    print(markdown(head, [tuple(row[column] for column in columns) for row in rows]))


def measure(
    folder: Path, engine: str, parts: Sequence[str] = (), precision: str = "graph", lora_rank: int = 0
) -> list[dict[str, Any]]:
    """A row for each graph that a pipeline runs, and that has this precision. The plans are thrown away."""
    rows = []
    for graph in graphs(Bundle.open(folder, verify=False), parts):
        if precision != "graph" and not graph.startswith(QUANTIZED_PARTS[precision]):
            continue
        command = [sys.executable, "-m", "vega_edge.bench.engines", str(folder), "--engine", engine]
        command += ["--graph", graph, "--precision", precision, "--lora-rank", str(lora_rank)]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            errors.seek(0)
            if done.returncode:
                raise SystemExit(f"{folder}, {graph}: {(errors.read().strip().splitlines() or ['killed'])[-1]}")
        rows.append(json.loads(done.stdout))
    return rows


def build_here(folder: Path, graph: str, engine: str, precision: str, lora_rank: int) -> dict[str, Any]:
    bundle, library = Bundle.open(folder, verify=False), load_library(engine)
    path, part = bundle.file(graph), graph.split("/")[0]
    with tempfile.TemporaryDirectory() as work:
        lora = Path(work) / "random.safetensors"
        if lora_rank:
            random_lora(bundle, lora, lora_rank)
        start, before = time.monotonic(), os.times()
        patches = Patches(bundle, [(lora, 1.0)] if lora_rank else [])
        ranges = profile(part, read_inputs(library, path), bundle_sizes(bundle), latent_px(bundle))
        targets = check_targets(library, FP8_TARGETS if precision == "fp8" and library.portable else (), precision)
        made_up = _made_up(path) if precision == "fp8" else None
        with prepared(path, patches.of(part), precision, Path(work), made_up) as source:
            prepared_s, resident = time.monotonic() - start, psutil.Process().memory_info().rss
            plan = Path(work) / "plan"
            build_apart(Job(library, source, ranges, targets), plan, lambda share, phase: None)
            size, seconds, after = plan.stat().st_size, time.monotonic() - start, os.times()
    return {
        "bundle": folder.name, "graph": graph, "precision": precision, "lora_rank": lora_rank,
        "mb": round(size / 1e6, 1), "seconds": round(seconds, 1), "prepared_s": round(prepared_s, 1),
        "cpu_s": round(sum(after[:4]) - sum(before[:4]), 1),
        "peak_gb": round((resident + peak_mb(children=True) * 2**20) / 1e9, 2),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in ranges.items()},
    }  # fmt: skip


def _made_up(graph: Path) -> dict[str, float]:
    import onnx

    return {node.input[0]: 1.0 for node in matrix_products(onnx.load(graph, load_external_data=False))}


if __name__ == "__main__":
    main()
