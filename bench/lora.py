"""A LoRA added as a bundle is opened: what it costs in time and memory beside opening without it.

    python -m vega_edge.bench.lora BUNDLE [--lora FILE] [--rank 128] [--engine NAME] -o benchmarks/results/lora.json

Without --lora one of random numbers is made, over the kinds of module that VegaRT's touches (233 modules in Vega).
Each opening is a process of its own. Goals of the project: VegaRT's on Vega is patched in 20 s or less on two cores, in
no more memory than the patched layers take. They are in the result; exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..models import find_bundle
from ..onnx_file import read_weights
from ..runtime.patches import Patches
from .machine import facts, markdown, peak_mb

PATCH_S, MODULES = 20.0, 233  # the goal, and the modules of VegaRT's LoRA, for which it is
# What VegaRT's LoRA touches: the names its modules end with
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def random_lora(bundle: Bundle, path: Path, rank: int) -> int:
    """Writes a LoRA of random numbers for the bundle's U-Net. Returns how many modules it has."""
    parameters = (bundle.manifest.parts["unet"].parameters if bundle.manifest else None) or {}
    weights = read_weights(bundle.graph("unet"))
    shapes = {}
    for name, place in parameters.items():
        shape = weights[place.initializer].shape
        shapes[name] = shape[::-1] if place.transposed else shape
    return write_random_lora(shapes, path, rank)


def write_random_lora(shapes: Mapping[str, Sequence[int]], path: Path, rank: int) -> int:
    """As `random_lora`, for a U-Net whose parameters have these shapes: over TARGETS, in PEFT's spelling, float16."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or not module.endswith(TARGETS):
            continue
        out, inside, *kernel = shape
        for side, size in (("A", (rank, inside, *kernel)), ("B", (out, rank, *(1 for _ in kernel)))):
            values = random.standard_normal(size, np.float32) * 0.02
            tensors[f"unet.{module}.lora_{side}.weight"] = values.astype(np.float16)
    save_file(tensors, path)
    return len(tensors) // 2


def measure(bundle: Path, engine: str, lora: Path | None) -> dict[str, Any]:
    """In this process: seconds to patch, and to open the U-Net with what came of it; peak memory."""
    from ..engines import open_engine

    opened = Bundle.open(bundle, verify=False)
    start, before = time.perf_counter(), peak_mb()
    patches = Patches(opened, [(lora, 1.0)] if lora else [])
    weights = patches.of("unet")
    patched, patch_cpu_s = time.perf_counter(), time.process_time()
    patching_peak = peak_mb()
    engine_open = open_engine(opened.graph("unet"), engine, weights=weights)
    done = time.perf_counter()
    result = {
        "modules": len(weights), "patched_mb": sum(a.nbytes for a in weights.values()) / 1e6,
        "patch_s": patched - start, "patch_cpu_s": patch_cpu_s,
        "patch_peak_mb": patching_peak - before, "open_s": done - patched,
        "peak_mb": peak_mb(),
    }  # fmt: skip
    engine_open.close()
    return result


def held_against_goals(patched: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a goal: what, got, goal, met. None for a LoRA of another size than VegaRT's."""
    if patched["modules"] != MODULES:
        return []
    rows = (("patch_s", PATCH_S), ("patch_peak_mb", patched["patched_mb"]))
    return [{"what": n, "got": round(patched[n], 1), "goal": g, "met": patched[n] <= g} for n, g in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a model's name or a bundle's folder")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in the process that is measured
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    arguments.bundle = find_bundle(arguments.bundle)
    if arguments.one:
        print(json.dumps(measure(arguments.bundle, arguments.engine, arguments.lora)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lora = arguments.lora
        if lora is None:
            lora = Path(folder) / "random.safetensors"
            random_lora(Bundle.open(arguments.bundle, verify=False), lora, arguments.rank)
        command = [
            sys.executable,
            "-m",
            "vega_edge.bench.lora",
            str(arguments.bundle),
            "--one",
            "--engine",
            arguments.engine,
        ]
        results = {}
        for name, more in (("without", []), ("with", ["--lora", str(lora)])):
            run = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
            results[name] = json.loads(run.stdout)
    rows = [
        (name, r["modules"], f"{r['patch_s']:.1f} s", f"{r['patch_cpu_s']:.1f} s", f"{r['open_s']:.1f} s", f"{r['patched_mb']:.0f} MB", f"{r['patch_peak_mb']:.0f} MB", f"{r['peak_mb']:.0f} MB")
        for name, r in results.items()
    ]  # fmt: skip
    print(
        markdown(
            [
                "LoRA",
                "modules",
                "patching",
                "of the CPU",
                "opening",
                "patched weights",
                "peak of patching",
                "peak of all",
            ],
            rows,
        )
    )
    goals = held_against_goals(results["with"])
    if arguments.output:
        record = {
            **facts(),
            "bundle": arguments.bundle.name,
            "engine": arguments.engine,
            "rank": arguments.rank,
            "goals": goals,
            **results,
        }
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if missed := [f"{g['what']}: {g['got']:g}, goal {g['goal']:g}" for g in goals if not g["met"]]:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
