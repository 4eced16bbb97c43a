"""What building engines costs: seconds, processor seconds and peak memory of each part, in a process of its own.

python -m vega_edge.bench.engines BUNDLE [BUNDLE ...] --engine tensorrt-rtx -o bench/results/engines.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..export.trt_build import graphs
from ..export.trt_library import load_library
from ..export.trt_network import Job, build_plan, read_inputs
from ..export.trt_profiles import bundle_sizes, latent_px, profile
from ..models import find_bundle
from .machine import facts, markdown, peak_mb


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="models' names or bundles' folders")
    parser.add_argument("--engine", default="tensorrt-rtx")
    parser.add_argument("--part", action="append", default=[])
    parser.add_argument("--graph", help=argparse.SUPPRESS)  # one build, in this process
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    bundles = [find_bundle(name) for name in arguments.bundles]
    if arguments.graph:
        print(json.dumps(build_here(bundles[0], arguments.graph, arguments.engine)))
        return
    rows = [row for bundle in bundles for row in measure(bundle, arguments.engine, arguments.part)]
    library = load_library(arguments.engine)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {**facts(), "library": f"{library.name} {library.version}", "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = ("bundle", "graph", "engine MB", "seconds", "processor seconds", "peak GB")
    print(
        markdown(
            head, [(r["bundle"], r["graph"], *(r[k] for k in ("mb", "seconds", "cpu_s", "peak_gb"))) for r in rows]
        )
    )


def measure(folder: Path, engine: str, parts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each graph that a pipeline runs. The plans are thrown away."""
    rows = []
    for graph in graphs(Bundle.open(folder, verify=False), parts):
        command = [sys.executable, "-m", "vega_edge.bench.engines", str(folder), "--engine", engine, "--graph", graph]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            errors.seek(0)
            if done.returncode:
                raise SystemExit(f"{folder}, {graph}: {(errors.read().strip().splitlines() or ['killed'])[-1]}")
        rows.append(json.loads(done.stdout))
    return rows


def build_here(folder: Path, graph: str, engine: str) -> dict[str, Any]:
    bundle, library = Bundle.open(folder, verify=False), load_library(engine)
    path, part = bundle.file(graph), graph.split("/")[0]
    start = time.monotonic()
    ranges = profile(part, read_inputs(library, path), bundle_sizes(bundle), latent_px(bundle))
    plan = build_plan(Job(library, path, ranges)).content
    return {
        "bundle": folder.name, "graph": graph, "mb": round(len(plan) / 1e6, 1),
        "seconds": round(time.monotonic() - start, 1), "cpu_s": round(time.process_time(), 1),
        "peak_gb": round(peak_mb() * 2**20 / 1e9, 2),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in ranges.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
