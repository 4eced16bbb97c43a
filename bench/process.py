"""Whole processes, from nothing to a picture file: `vega-edge generate` against diffusers, taking turns.

    python -m vega_edge.bench.process -o benchmarks/results/process.json

Both draw the same model with the same prompt, seed, scheduler and steps, and their pictures are compared. Ours reads the
package's bundle, diffusers the checkpoint and its LoRA: its time includes loading and fusing that, which the bundle has
behind it. Also: what `import vega_edge` costs beside `import numpy`. Ratios are of medians in this one run. Exit status
1 where a goal of the project is missed.
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
SAME_DB = 60.0  # PSNR, as in bench.parity; the bundle's weights are rounded to fp16 after fusing
IMPORTS = ("numpy", "vega_edge", "vega_edge.runtime.pipeline", "diffusers")
OURS = {f"vega-edge, {engine}": engine for engine in ("onnxruntime-cpu", "openvino")}
PEER = "diffusers"
DIFFUSERS = """
import sys, torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
checkpoint, lora, out = sys.argv[1:]
pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint, local_files_only=True, torch_dtype=torch.float32)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora)
pipe.fuse_lora()
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(7)
image = pipe({prompt!r}, num_inference_steps=4, guidance_scale=0.0, height=128, width=128, generator=noise).images[0]
image.save(out)
""".replace("{prompt!r}", repr(PROMPT))


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of one run; raises if it fails.

    The system counts what this process has at that moment into a child's peak: it is that of the child only where that
    grows larger than this process, which therefore imports as little as it can.
    """
    if sys.platform == "win32":
        raise SystemExit("this measurement needs a POSIX system: peak memory is read as wait4 tells it")
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], list(command), os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1024


def turns(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and peak MB of each command: once for warming up, then `runs` times in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for i in range(runs + 1):
        for name, command in commands.items():
            result = measure(command)
            if i:
                taken[name].append(result)
    return taken


def times(taken: Sequence[tuple[float, float]]) -> dict[str, float]:
    seconds = [s for s, _ in taken]
    return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def draw(runs: int) -> dict[str, dict[str, float]]:
    """Each way to the picture: its time, peak memory and, of ours, `psnr_db`, how near it is to diffusers'."""
    recipe = recipes()["demo-vegart"]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.png" for i, name in enumerate((*OURS, PEER))}
        ours = [sys.executable, "-m", "vega_edge", "generate", PROMPT, "--seed", "7", "--overwrite"]
        commands = {name: [*ours, "--engine", engine, "-o", str(files[name])] for name, engine in OURS.items()}
        lora = recipe.lora_paths[0][0].parent
        commands[PEER] = [sys.executable, "-c", DIFFUSERS, str(recipe.checkpoint_path), str(lora), str(files[PEER])]
        taken = turns(commands, runs)
        told = {name: {**times(t), "peak_mb": max(mb for _, mb in t)} for name, t in taken.items()}
        for name in OURS:
            told[name]["psnr_db"] = likeness(files[name], files[PEER])
    return told


def likeness(one: Path, other: Path) -> float:
    """PSNR of two picture files in dB, 99 where they are equal."""
    import numpy as np  # not before: see `measure`
    from PIL import Image

    from .parity import psnr

    a, b = (np.asarray(Image.open(file).convert("RGB")) for file in (one, other))
    return round(psnr(a, b), 1)


def related(generate: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each of ours: how many times `faster` than diffusers, the share of its `memory`, and `psnr_db`."""
    peer = generate[PEER]
    return {
        name: {
            "faster": peer["seconds"] / g["seconds"], "memory": g["peak_mb"] / peer["peak_mb"], "psnr_db": g["psnr_db"],
        }
        for name, g in generate.items()
        if name != PEER
    }  # fmt: skip


def table(generate: Mapping[str, Mapping[str, float]]) -> str:
    """The pictures' costs, diffusers' last."""
    ratios = related(generate)
    rows: list[Any] = []
    for name, g in generate.items():
        r = ratios.get(name)
        told = (f"{r['faster']:.1f}×", f"{r['memory']:.2f}", f"{r['psnr_db']:.0f} dB") if r else ("1.0×", "1.00", "")
        rows.append((name, f"{g['seconds']:.2f} s", f"{g['peak_mb']:.0f} MB", *told))
    head = ("whole process, 4 steps, 128×128", "time", "peak memory")
    return markdown((*head, "times faster than diffusers", "share of its memory", "PSNR from its picture"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    commands = {f"import {module}": [sys.executable, "-c", f"import {module}"] for module in IMPORTS}
    imports = {name: times(taken) for name, taken in turns(commands, 2 * arguments.runs).items()}
    generate = draw(arguments.runs)
    print(table(generate))
    print("diffusers' time includes loading and fusing the LoRA, which the bundle has behind it\n")
    base = imports["import numpy"]["seconds"]
    rows = [(name, f"{i['seconds']:.3f} s", f"{i['seconds'] / base:.2f}") for name, i in imports.items()]
    print(markdown(["import", "time", "times numpy"], rows))
    ratios, import_ratio = related(generate), imports["import vega_edge"]["seconds"] / base
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
        if ratio["psnr_db"] < SAME_DB:
            missed.append(
                f"{name}: another picture than diffusers', {ratio['psnr_db']:.0f} dB from it, goal {SAME_DB:.0f}"
            )
    if import_ratio > IMPORT:
        missed.append(f"import vega_edge: {import_ratio:.2f} of numpy's, goal {IMPORT}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
