"""Does every scheduler draw what it is told? The embedded models through every name at 25 steps, read by the checker.

    python -m vega_edge.bench.schedulers -o benchmarks/results/schedulers.json --sheet docs/schedulers.png
    python -m vega_edge.bench.schedulers -o benchmarks/results/schedulers.json --model demo-small-sd --count 20

Names made for few steps without guidance (LCM, TCD) draw with demo-vegart instead of demo-vega; models of the SD kind
have no such. Rows of other models and numbers of steps that the file has stay there. Exit status 1 where a name scores
more than 10 points below Euler of its family and no reason is stated for it in REASONS, or a picture is not finite.
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
from ..runtime.schedulers import Scheduler, all_schedulers
from .machine import facts, markdown
from .meaning_prompts import scenes

STEPS = 25
GUIDANCE = 5.0
DISTILLED = ("LCM", "TCD")  # consistency samplers: what they expect of a network is what demo-vegart learned
ALLOWED_POINTS = 10
_HIGH_ORDER = (
    "explicit multistep of fourth order: guidance narrows what it is stable for (Lu et al. 2022, arXiv:2211.01095, "
    "section 3), and colours overshoot; the references' numbers are the same, and 50 steps mend it"
)
REASONS = {
    "PNDM": _HIGH_ORDER,
    "PLMS": _HIGH_ORDER,
    "LMS": _HIGH_ORDER,
    "DPM++ 3M SDE": "third order on levels even in time; 50 steps mend it, and so do Karras' or exponential levels",
    "DPM fast": "25 are calls of the model here, in 9 steps; 50 calls mend it",
}
SHEET_PROMPT, SHEET_SEED = "a big red heart above a small yellow star in the night sky", 1


@dataclass(frozen=True)
class Row:
    family: str
    name: str
    model: str
    steps: int
    guidance: float
    prompts: int
    all: float  # per cent
    seconds_a_picture: float
    measured: str  # date, commit and engine: a file may hold several runs' rows


def settings(scheduler: Scheduler, steps: int = STEPS, guidance: float = GUIDANCE) -> dict[str, Any]:
    """The options a scheduler is tried with."""
    options = {"scheduler": scheduler.name, "family": scheduler.family, "steps": steps}
    return {**options, "guidance": 0.0 if scheduler.name in DISTILLED else guidance}


def tried(model: str) -> list[tuple[str, Scheduler]]:
    """Every scheduler, with the model that draws: `model`, or for few steps the one distilled from it."""
    few = {"demo-vega": "demo-vegart"}
    pairs = [(few.get(model) if row.name in DISTILLED else model, row) for row in all_schedulers()]
    return [(name, row) for name, row in pairs if name]


def evaluate(pipe: Pipeline, model: str, scheduler: Scheduler, count: int, options: dict[str, Any], run: str) -> Row:
    right = []
    start = time.perf_counter()
    for i, scene in enumerate(scenes("seen", count)):
        result = pipe(full_caption(scene), seed=1000 + i, **options)  # NotFiniteError ends the program
        right.append(score(np.asarray(result.images[0]), scene).all)
    seconds = round((time.perf_counter() - start) / count, 3)
    percent = round(100 * float(np.mean(right)), 1)
    steps, guidance = options["steps"], options["guidance"]
    return Row(scheduler.family, scheduler.name, model, steps, guidance, count, percent, seconds, run)


def sheet(pipes: dict[str, Pipeline], columns: int = 9) -> Image.Image:
    """One picture a scheduler, of the same prompt and seed, with its name below."""
    known, font = tried("demo-vega"), ImageFont.load_default(size=11)
    side, text, gap = 128, 30, 8
    rows = -(-len(known) // columns)
    out = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), (250, 250, 250))
    pen = ImageDraw.Draw(out)
    for i, (model, scheduler) in enumerate(known):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        out.paste(pipes[model](SHEET_PROMPT, seed=SHEET_SEED, **settings(scheduler)).images[0], (x, y))
        for line, words in enumerate(textwrap.wrap(f"{scheduler.name} ({scheduler.family})", 22)):
            pen.text((x, y + side + 2 + 13 * line), words, fill=(30, 30, 30), font=font)
    return out


def shortfalls(rows: list[Row]) -> list[str]:
    """Names more than ALLOWED_POINTS below the Euler of their family at as many steps, of the same model."""
    euler = {(r.family, r.steps, r.guidance, r.model): r.all for r in rows if r.name == "Euler"}
    found = [(r, euler.get((r.family, r.steps, r.guidance, r.model))) for r in rows]
    return [
        f"{r.name} ({r.family}, {r.model}): {r.all} %, Euler has {best}; {REASONS.get(r.name, 'no reason is known')}"
        for r, best in found
        if best is not None and r.all < best - ALLOWED_POINTS
    ]


def table(rows: list[Row]) -> str:
    """A line a name, a column a family and model."""
    columns = list(dict.fromkeys((r.family, "demo-vega" if r.name in DISTILLED else r.model) for r in rows))
    percent = {(r.family, "demo-vega" if r.name in DISTILLED else r.model, r.name): r.all for r in rows}

    def cell(family: str, model: str, name: str) -> str:
        return f"{percent[family, model, name]:.1f} %" if (family, model, name) in percent else ""

    heads = ("scheduler", *(f"{family}, {model}" for family, model in columns))
    return markdown(heads, [(n, *(cell(*c, n) for c in columns)) for n in dict.fromkeys(r.name for r in rows)])


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """With those that the file has of other settings."""
    told = json.loads(path.read_text())["rows"] if path.is_file() else []
    new = {(r.family, r.name, r.model, r.steps, r.guidance) for r in rows}
    kept = [Row(**row) for row in told]
    return [r for r in kept if (r.family, r.name, r.model, r.steps, r.guidance) not in new] + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="prompts a scheduler")
    parser.add_argument("--model", default="demo-vega", help="demo-vega, demo-small-sd or demo-tiny-sd")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these schedulers only")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--sheet", type=Path, help="draw the contact sheet of demo-vega into this file")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    known = [(m, row) for m, row in tried(arguments.model) if not arguments.only or row.name in arguments.only]
    names = {m for m, _ in known} | ({"demo-vega", "demo-vegart"} if arguments.sheet else set())
    pipes = {name: Pipeline.open(name, arguments.engine) for name in names}
    if arguments.sheet:
        sheet(pipes).quantize(256, dither=Image.Dither.NONE).save(arguments.sheet, optimize=True)
    here, rows = facts(), []
    run = f"{here['date']}, {here['commit']}, {arguments.engine}"
    for model, scheduler in known if arguments.count else []:
        options = settings(scheduler, arguments.steps, arguments.guidance)
        rows.append(evaluate(pipes[model], model, scheduler, arguments.count, options, run))
        print(rows[-1].model, rows[-1].family, rows[-1].name, rows[-1].all, file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.output and rows:
        every = merged(arguments.output, rows)
        told = {**here, "rows": [asdict(r) for r in every]}
        arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    missed = shortfalls(rows)
    print(*missed, sep="\n")
    if any("no reason is known" in line for line in missed):
        sys.exit(1)


if __name__ == "__main__":
    main()
