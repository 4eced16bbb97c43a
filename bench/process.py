"""Whole processes, from nothing to a picture file: `vega-edge generate` against diffusers, taking turns.

    python -m vega_edge.bench.process -o bench/results/process.json

Both read the same checkpoint's model, draw the same prompt with the same seed, scheduler and steps. Also: what
`import vega_edge` costs beside `import numpy`. Ratios are of medians in this one run. Exit status 1 where a goal of the
project is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models import recipes
from .machine import facts, markdown

PROMPT = "a big red star on a blue background"
FASTER, MEMORY, IMPORT = 5.0, 1 / 3, 1.2  # the project's goals: times, share of the memory, times numpy's import
DIFFUSERS = """
import sys, torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
checkpoint, lora, out = sys.argv[1:]
pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint, local_files_only=True, torch_dtype=torch.float32)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora)
pipe.fuse_lora()
pipe.set_progress_bar_config(disable=True)
image = pipe({prompt!r}, num_inference_steps=4, guidance_scale=0.0, height=128, width=128, generator=torch.Generator().manual_seed(7))
image.images[0].save(out)
""".replace("{prompt!r}", repr(PROMPT))


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of one run; raises if it fails."""
    if sys.platform == "win32":
        raise SystemExit("this measurement needs a POSIX system: peak memory is read as wait4 tells it")
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1024


def turns(commands: dict[str, Sequence[str]], runs: int) -> dict[str, dict[str, float]]:
    """Each command once for warming up, then `runs` times in turn; medians."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for i in range(runs + 1):
        for name, command in commands.items():
            result = measure(command)
            if i:
                taken[name].append(result)
    return {
        n: {
            "seconds": statistics.median(s for s, _ in t),
            "least": min(s for s, _ in t),
            "most": max(s for s, _ in t),
            "peak_mb": max(m for _, m in t),
        }
        for n, t in taken.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    recipe = recipes()["demo-vegart"]
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            python,
            "-m",
            "vega_edge",
            "generate",
            PROMPT,
            "--seed",
            "7",
            "--overwrite",
            "-o",
            f"{folder}/ours.png",
            "--engine",
        ]
        generate = turns(
            {
                "vega-edge, onnxruntime-cpu": [*ours, "onnxruntime-cpu"],
                "vega-edge, openvino": [*ours, "openvino"],
                "diffusers": [python, "-c", DIFFUSERS, str(recipe.checkpoint_path), str(recipe.lora_paths[0][0].parent), f"{folder}/theirs.png"],
            },
            arguments.runs,
        )  # fmt: skip
    imports = turns(
        {
            f"import {m}": [python, "-c", f"import {m}"]
            for m in ("numpy", "vega_edge", "vega_edge.runtime.pipeline", "diffusers")
        },
        2 * arguments.runs,
    )
    peer, base = generate["diffusers"], imports["import numpy"]
    rows: list[Any] = [
        (
            n,
            f"{g['seconds']:.2f} s",
            f"{g['peak_mb']:.0f} MB",
            f"{peer['seconds'] / g['seconds']:.1f}×",
            f"{g['peak_mb'] / peer['peak_mb']:.2f}",
        )
        for n, g in generate.items()
    ]
    print(
        markdown(
            [
                "whole process, 4 steps, 128×128",
                "time",
                "peak memory",
                "times faster than diffusers",
                "share of its memory",
            ],
            rows,
        )
    )
    print()
    print(
        markdown(
            ["import", "time", "times numpy"],
            [(n, f"{i['seconds']:.3f} s", f"{i['seconds'] / base['seconds']:.2f}") for n, i in imports.items()],
        )
    )
    ratios = {
        n: {"faster": peer["seconds"] / g["seconds"], "memory": g["peak_mb"] / peer["peak_mb"]}
        for n, g in generate.items()
        if g is not peer
    }
    import_ratio = imports["import vega_edge"]["seconds"] / base["seconds"]
    if arguments.output:
        result = {**facts(), "generate": generate, "import": imports, "ratios": {**ratios, "import": import_ratio}}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    missed = shortfalls(ratios, import_ratio)
    print("", *missed, sep="\n")
    return int(bool(missed))


def shortfalls(ratios: Mapping[str, Mapping[str, float]], import_ratio: float) -> list[str]:
    """Which of the project's goals are missed."""
    missed = []
    for name, ratio in ratios.items():
        if ratio["faster"] < FASTER:
            missed.append(f"{name}: {ratio['faster']:.1f} times faster than diffusers, goal {FASTER}")
        if ratio["memory"] > MEMORY:
            missed.append(f"{name}: {ratio['memory']:.2f} of diffusers' memory, goal {MEMORY:.2f}")
    if import_ratio > IMPORT:
        missed.append(f"import vega_edge: {import_ratio:.2f} of numpy's, goal {IMPORT}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
