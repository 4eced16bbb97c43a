"""Do the embedded models draw what they are told? Their own pictures, read by the checker.

    python -m vega_edge.bench.meaning -o benchmarks/results/meaning.json
    python -m vega_edge.bench.meaning --dtypes -o benchmarks/results/dtypes.json      # fp32, fp16, bf16 and int8 side by side

draws with the exported bundles (see `vega-edge export`) and prints the table of `demo/README.md`. Exit status 1 where a
goal is missed, or where the base without its LoRA is not clearly worse than with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, VegaEdgeError
from ..models import recipes
from ..runtime.pipeline import Pipeline
from .machine import facts
from .meaning_prompts import KINDS, Asked, ceiling, judge, prompts
from .meaning_rows import Row, Run, in_order, load, merged, save, shortfalls, table


@dataclass(frozen=True)
class Setting:
    """One row: which bundle, how it is run, on which prompts, and what is to be reached (None: reported only)."""

    title: str
    bundle: str
    prompts: str  # one of meaning_prompts.KINDS
    options: dict[str, Any]
    goal: float | None = None


BASE = {"scheduler": "Euler", "steps": 25, "guidance": 5.0}
SD = {"scheduler": "DPM Multi", "steps": 25, "guidance": 5.0}


def few(steps: int) -> dict[str, Any]:
    return {"scheduler": "LCM", "steps": steps, "guidance": 0.0}


SETTINGS = [
    Setting("demo-vega, Euler, 25 steps, guidance 5", "demo-vega", "seen", BASE, 95),
    Setting("demo-vega, Euler, 25 steps, guidance 5", "demo-vega", "unseen", BASE, 90),
    Setting("demo-vega, Euler, 25 steps, guidance 5", "demo-vega", "two", BASE, 80),
    Setting("demo-vega, Euler, 25 steps, guidance 5", "demo-vega", "short", BASE),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "seen", few(4), 90),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "unseen", few(4), 85),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "two", few(4), 80),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "short", few(4)),
    Setting("control: demo-vega without the LoRA, LCM, 4 steps", "demo-vega", "seen", few(4)),
    Setting("demo-vegart, LCM, 2 steps", "demo-vegart", "seen", few(2)),
    Setting("control: demo-vega without the LoRA, LCM, 2 steps", "demo-vega", "seen", few(2)),
    Setting("demo-small-sd, DPM Multi, 25 steps, guidance 5", "demo-small-sd", "seen", SD, 90),
    Setting("demo-small-sd, DPM Multi, 25 steps, guidance 5", "demo-small-sd", "unseen", SD),
    Setting("demo-tiny-sd, DPM Multi, 25 steps, guidance 5", "demo-tiny-sd", "seen", SD, 85),
    Setting("demo-tiny-sd, DPM Multi, 25 steps, guidance 5", "demo-tiny-sd", "unseen", SD),
]
MODELS = tuple(dict.fromkeys(setting.bundle for setting in SETTINGS))
Pictures = list[NDArray[np.uint8]]


def draw(pipe: Pipeline, asked: Sequence[Asked], options: dict[str, Any]) -> Pictures:
    """One sRGB picture [height, width, 3] a prompt, prompt i with seed 1000 + i."""
    return [np.asarray(pipe(a.text, seed=1000 + i, **options).images[0]) for i, a in enumerate(asked)]


class Teacher:
    """demo-vega's guided pictures, which those of few steps are compared with; drawn once for each kind of prompts."""

    def __init__(self, engine: str) -> None:
        self._engine, self._drawn = engine, dict[str, Pictures]()

    def keep(self, setting: Setting, images: Pictures) -> None:
        """`images` are kept if the setting is the teacher's own."""
        if setting.bundle == "demo-vega" and setting.options == BASE:
            self._drawn[setting.prompts] = images

    def distance(self, kind: str, asked: Sequence[Asked], images: Pictures) -> float:
        """Root mean square of the difference from the teacher's picture, of 255, averaged over the pictures."""
        if kind not in self._drawn:
            with contextlib.closing(Pipeline.open("demo-vega", self._engine)) as pipe:
                self._drawn[kind] = draw(pipe, asked, BASE)
        pairs = zip(images, self._drawn[kind], strict=True)
        return float(np.mean([np.sqrt(np.mean((a.astype(float) - b) ** 2)) for a, b in pairs]))


def evaluate(setting: Setting, count: int, engine: str, teacher: Teacher | None) -> Row:
    """Draws and judges `count` prompts; without a teacher, the row has no distance from it."""
    asked = prompts(setting.prompts, count)
    with contextlib.closing(Pipeline.open(setting.bundle, engine)) as pipe:
        start = time.perf_counter()
        images = draw(pipe, asked, setting.options)
        seconds = time.perf_counter() - start
    rms = None
    if teacher:
        teacher.keep(setting, images)
        if setting.options["scheduler"] == "LCM":
            rms = round(teacher.distance(setting.prompts, asked, images), 2)
    found = [judge(image, one) for image, one in zip(images, asked, strict=True)]

    def mean(name: str) -> float:
        """Over the prompts that say something of it."""
        told = [value for value in (getattr(one, name) for one in found) if value is not None]
        return float(np.mean(told)) if told else 0.0

    percent = {name: round(100 * mean(name), 1) for name in ("color", "shape", "background", "all")}
    return Row(
        setting.title, setting.prompts, count, **percent, goal=setting.goal, fit=round(mean("fit"), 3), teacher_rms=rms,
        seconds_a_picture=round(seconds / count, 3),
    )  # fmt: skip


def check_bundles(models: Sequence[str]) -> None:
    """BundleError that says what to run unless all of them are exported: before minutes are spent on some."""
    known = recipes()
    if missing := [name for name in models if not known[name].ready]:
        commands = " && ".join(f"vega-edge export {name}" for name in missing)
        raise BundleError(f"{', '.join(missing)}: no bundle yet; run: {commands}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="prompts a row")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="MODEL", choices=MODELS, help="rows of these bundles; the others in the file stay"
    )
    parser.add_argument(
        "--prompts", metavar="KIND", nargs="+", choices=KINDS, help=f"rows of these: {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--dtypes",
        metavar="MODEL",
        nargs="?",
        const="demo-vega",
        help="compare dtypes of this model instead, demo-vega or demo-vegart, exporting each; default: demo-vega",
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    try:
        missed = _compare_dtypes(arguments) if arguments.dtypes else _measure(arguments)
    except VegaEdgeError as error:
        sys.exit(f"vega-edge: {error}")
    if missed:
        sys.exit("\n".join(missed))


def _measure(arguments: argparse.Namespace) -> list[str]:
    """What is missed, of all rows that the output then holds."""
    chosen = [s for s in SETTINGS if not arguments.only or s.bundle in arguments.only]
    chosen = [s for s in chosen if not arguments.prompts or s.prompts in arguments.prompts]
    few_steps = [s for s in chosen if s.options["scheduler"] == "LCM"]
    check_bundles([m for m in MODELS if any(s.bundle == m for s in chosen) or (few_steps and m == "demo-vega")])
    one, two = ceiling(arguments.count)
    print(f"the checker on clean renderings: {one:.1f} % (one thing), {two:.1f} % (two)", flush=True)
    told = {**facts(), "engine": arguments.engine, "checker_on_renderings": {"one": one, "two": two}}
    part = len(chosen) < len(SETTINGS)
    before = load(arguments.output) if part and arguments.output else []
    new, teacher = Run(told, []), Teacher(arguments.engine)
    for setting in chosen:
        new.rows.append(evaluate(setting, arguments.count, arguments.engine, teacher))
        print(table(new.rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if arguments.output:  # a row takes minutes
            save(arguments.output, merged(before, new))
    rows = in_order(merged(before, new), [(s.title, s.prompts) for s in SETTINGS])
    print(table(rows))
    return shortfalls(rows)


def _compare_dtypes(arguments: argparse.Namespace) -> list[str]:
    from . import meaning_dtypes as dtypes

    if arguments.dtypes not in dtypes.MODELS:
        sys.exit(f"--dtypes must be one of {', '.join(dtypes.MODELS)}, not {arguments.dtypes!r}")
    rows = dtypes.compare(arguments.dtypes, arguments.count, arguments.engine)
    print(dtypes.table(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps({**facts(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return dtypes.shortfalls(rows)


if __name__ == "__main__":
    main()
