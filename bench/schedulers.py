"""Does every scheduler draw what it is told? The embedded models through every name at 25 steps, read by the checker.

    python -m vega_edge.bench.schedulers -o bench/results/schedulers.json --sheet docs/schedulers.png

Guided names draw with demo-vega; those made for few steps without guidance (LCM, TCD) with demo-vegart. Exit status 1
where one scores more than 10 points below Euler of its family, or a picture is not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..demo.check import score
from ..demo.scenes import full_caption
from ..runtime.pipeline import Pipeline
from ..runtime.schedulers import FAMILIES, Scheduler, all_schedulers
from .machine import facts, markdown
from .meaning import scenes

STEPS = 25
GUIDANCE = 5.0
DISTILLED = ("LCM", "TCD")  # consistency samplers: what they expect of a network is what demo-vegart learned
ALLOWED_POINTS = 10
SHEET_PROMPT, SHEET_SEED = "a big red heart above a small yellow star in the night sky", 7


@dataclass(frozen=True)
class Row:
    family: str
    name: str
    model: str
    prompts: int
    all: float  # per cent
    seconds_a_picture: float


def settings(scheduler: Scheduler) -> tuple[str, dict[str, Any]]:
    """The model and the options a scheduler is tried with."""
    distilled = scheduler.name in DISTILLED
    options = {"scheduler": scheduler.name, "family": scheduler.family, "steps": STEPS}
    return ("demo-vegart" if distilled else "demo-vega"), {**options, "guidance": 0.0 if distilled else GUIDANCE}


def evaluate(pipe: Pipeline, scheduler: Scheduler, count: int) -> Row:
    model, options = settings(scheduler)
    right = []
    start = time.perf_counter()
    for i, scene in enumerate(scenes("seen", count)):
        result = pipe(full_caption(scene), seed=1000 + i, **options)  # NotFiniteError ends the program
        right.append(score(np.asarray(result.images[0]), scene).all)
    seconds = (time.perf_counter() - start) / count
    return Row(scheduler.family, scheduler.name, model, count, round(100 * float(np.mean(right)), 1), round(seconds, 3))


def sheet(pipes: dict[str, Pipeline], columns: int = 9) -> Image.Image:
    """One picture a scheduler, of the same prompt and seed, with its name below."""
    known, font = all_schedulers(), ImageFont.load_default(size=11)
    side, text, gap = 128, 30, 8
    rows = -(-len(known) // columns)
    out = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), (250, 250, 250))
    pen = ImageDraw.Draw(out)
    for i, scheduler in enumerate(known):
        model, options = settings(scheduler)
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        out.paste(pipes[model](SHEET_PROMPT, seed=SHEET_SEED, **options).images[0], (x, y))
        for line, words in enumerate(textwrap.wrap(f"{scheduler.name} ({scheduler.family})", 22)):
            pen.text((x, y + side + 2 + 13 * line), words, fill=(30, 30, 30), font=font)
    return out


def shortfalls(rows: list[Row]) -> list[str]:
    """Names more than ALLOWED_POINTS below the Euler of their family."""
    euler = {r.family: r.all for r in rows if r.name == "Euler"}
    return [
        f"{r.name} ({r.family}): {r.all} %, Euler has {euler[r.family]}"
        for r in rows
        if r.family in euler and r.all < euler[r.family] - ALLOWED_POINTS
    ]


def table(rows: list[Row]) -> str:
    """A line a name, a column a family."""
    percent = {(r.family, r.name): r.all for r in rows}
    names = list(dict.fromkeys(r.name for r in rows))

    def cell(family: str, name: str) -> str:
        return f"{percent[family, name]:.1f} %" if (family, name) in percent else ""

    return markdown(("scheduler", *FAMILIES), [(n, *(cell(f, n) for f in FAMILIES)) for n in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="prompts a scheduler")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--sheet", type=Path, help="draw the contact sheet into this file")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    pipes = {name: Pipeline.open(name, arguments.engine) for name in ("demo-vega", "demo-vegart")}
    if arguments.sheet:
        sheet(pipes).quantize(256, dither=Image.Dither.NONE).save(arguments.sheet, optimize=True)
    rows = []
    for scheduler in all_schedulers():
        rows.append(evaluate(pipes[settings(scheduler)[0]], scheduler, arguments.count))
        print(rows[-1].family, rows[-1].name, rows[-1].all, file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.output:
        told = {**facts(), "engine": arguments.engine, "steps": STEPS, "rows": [asdict(r) for r in rows]}
        arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    if missed := shortfalls(rows):
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
