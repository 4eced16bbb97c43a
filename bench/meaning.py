"""Do the embedded models draw what they are told? Their own pictures, read by the checker.

    python -m vega_edge.bench.meaning -o bench/results/meaning.json
    python -m vega_edge.bench.meaning --dtypes -o bench/results/dtypes.json      # fp32, fp16, bf16 and int8 side by side

draws with the exported bundles (see `vega-edge export`) and prints the table of `demo/README.md`. Exit status 1 where a
goal is missed, or where the base without its LoRA is not clearly worse than with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..demo.check import read, score
from ..demo.render import render
from ..demo.scenes import Scene, Thing, combinations, full_caption, sample_scene
from ..runtime.pipeline import Pipeline
from .machine import facts, markdown


@dataclass(frozen=True)
class Setting:
    """One row: which bundle, how it is run, on which prompts, and what is to be reached (None: reported only)."""

    title: str
    bundle: str
    prompts: str  # seen, unseen, two
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
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "seen", few(4), 90),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "unseen", few(4), 85),
    Setting("demo-vegart, LCM, 4 steps", "demo-vegart", "two", few(4), 80),
    Setting("control: demo-vega without the LoRA, LCM, 4 steps", "demo-vega", "seen", few(4)),
    Setting("demo-vegart, LCM, 2 steps", "demo-vegart", "seen", few(2)),
    Setting("control: demo-vega without the LoRA, LCM, 2 steps", "demo-vega", "seen", few(2)),
    Setting("demo-small-sd, DPM Multi, 25 steps, guidance 5", "demo-small-sd", "seen", SD, 90),
    Setting("demo-small-sd, DPM Multi, 25 steps, guidance 5", "demo-small-sd", "unseen", SD),
    Setting("demo-tiny-sd, DPM Multi, 25 steps, guidance 5", "demo-tiny-sd", "seen", SD, 85),
    Setting("demo-tiny-sd, DPM Multi, 25 steps, guidance 5", "demo-tiny-sd", "unseen", SD),
]


def scenes(kind: str, count: int) -> list[Scene]:
    """The prompts of a row: the same for every row of that kind."""
    rng = np.random.default_rng({"seen": 101, "unseen": 102, "two": 103}[kind])
    if kind == "two":
        found: list[Scene] = []
        while len(found) < count:
            scene = sample_scene(rng, two=1.0)
            found.append(scene)
        return found
    combos = combinations(held_out=kind == "unseen")
    picks = [combos[i % len(combos)] for i in rng.permutation(max(count, len(combos)))[:count]]
    sizes = ("small", "", "", "big")
    return [Scene((Thing(c, s, sizes[int(rng.integers(4))], 0, 0, 0, 0),), b, 0) for c, s, b in picks]


def ceiling(count: int) -> tuple[float, float]:
    """The checker on clean renderings, per cent all right: one thing, two things."""
    rng = np.random.default_rng(104)
    right = []
    for two in (0.0, 1.0):
        drawn = [sample_scene(rng, two=two) for _ in range(count)]
        right.append(100 * np.mean([score(render(s), s).all for s in drawn]))
    return float(right[0]), float(right[1])


@dataclass
class Row:
    title: str
    prompts: str
    count: int
    color: float
    shape: float
    background: float
    all: float
    goal: float | None
    fit: float  # mean overlap with the ideal outline, 0 where the shape is wrong
    teacher_rms: float | None  # distance from the 25-step guided picture of the same seed, of 255
    seconds_a_picture: float


def pictures(pipe: Pipeline, drawn: list[Scene], options: dict[str, Any]) -> Iterator[NDArray[np.uint8]]:
    for i, scene in enumerate(drawn):
        yield np.asarray(pipe(full_caption(scene), seed=1000 + i, **options).images[0])


def evaluate(setting: Setting, count: int, engine: str, teacher: dict[str, list[NDArray[np.uint8]]]) -> Row:
    pipe = Pipeline.open(setting.bundle, engine)
    drawn = scenes(setting.prompts, count)
    start = time.perf_counter()
    images = list(pictures(pipe, drawn, setting.options))
    seconds = time.perf_counter() - start
    pipe.close()
    if setting.bundle == "demo-vega" and setting.options == BASE:
        teacher[setting.prompts] = images
    scores = [score(image, scene) for image, scene in zip(images, drawn, strict=True)]
    fits = [read(i).things[0].fit if s.shape else 0.0 for i, s in zip(images, scores, strict=True)]
    rms = None
    if setting.options["scheduler"] == "LCM" and setting.prompts in teacher:
        rms = float(
            np.mean(
                [
                    np.sqrt(np.mean((a.astype(float) - b) ** 2))
                    for a, b in zip(images, teacher[setting.prompts], strict=True)
                ]
            )
        )
    percent = {
        k: round(100 * float(np.mean([getattr(s, k) for s in scores])), 1)
        for k in ("color", "shape", "background", "all")
    }
    return Row(
        setting.title,
        setting.prompts,
        count,
        **percent,
        goal=setting.goal,
        fit=round(float(np.mean(fits)), 3),
        teacher_rms=rms and round(rms, 2),
        seconds_a_picture=round(seconds / count, 3),
    )


def table(rows: list[Row]) -> str:
    head = (
        "setting",
        "prompts",
        "all right",
        "goal",
        "colour",
        "shape",
        "background",
        "outline fit",
        "rms from teacher",
    )
    lines = [
        (r.title, f"{r.count} {r.prompts}", f"**{r.all:.1f} %**", f"≥ {r.goal:g}" if r.goal else "", f"{r.color:.1f}",
         f"{r.shape:.1f}", f"{r.background:.1f}", f"{r.fit:.3f}", "" if r.teacher_rms is None else f"{r.teacher_rms:.1f}")
        for r in rows
    ]  # fmt: skip
    return markdown(head, lines)


def shortfalls(rows: list[Row]) -> list[str]:
    """What the rows do not show that they should, in words."""
    found = [f"{r.title}, {r.prompts}: {r.all} %, goal {r.goal:g}" for r in rows if r.goal and r.all < r.goal]
    by_title = {(r.title, r.prompts): r for r in rows}
    for steps in (2, 4):
        ours = by_title.get((f"demo-vegart, LCM, {steps} steps", "seen"))
        control = by_title.get((f"control: demo-vega without the LoRA, LCM, {steps} steps", "seen"))
        if ours and control and not (ours.all > control.all + 3 and _nearer(ours, control)):
            found.append(f"{steps} steps without the LoRA are not clearly worse than with it")
    return found


def _rows_in(file: Path | None) -> list[Row]:
    if file is None or not file.exists():
        return []
    return [Row(**row) for row in json.loads(file.read_text())["rows"]]


def _nearer(ours: Row, control: Row) -> bool:
    assert ours.teacher_rms and control.teacher_rms
    return ours.fit > control.fit and ours.teacher_rms < control.teacher_rms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="prompts a row")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="rows of these bundles; the others in the file stay")
    parser.add_argument(
        "--dtypes",
        metavar="MODEL",
        nargs="?",
        const="demo-vega",
        help="compare dtypes of this model instead, demo-vega or demo-vegart, exporting each; default: demo-vega",
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.dtypes:
        _compare_dtypes(arguments)
        return
    teacher: dict[str, list[NDArray[np.uint8]]] = {}
    rows = []
    one, two = ceiling(arguments.count)
    print(f"the checker on clean renderings: {one:.1f} % (one thing), {two:.1f} % (two)", flush=True)
    before = _rows_in(arguments.output) if arguments.only else []
    for setting in SETTINGS:
        if not arguments.only or setting.bundle in arguments.only:
            rows.append(evaluate(setting, arguments.count, arguments.engine, teacher))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if arguments.output:  # a row takes minutes
                done = {(row.title, row.prompts) for row in rows}
                kept = [row for row in before if (row.title, row.prompts) not in done]
                told = {
                    **facts(), "engine": arguments.engine, "checker_on_renderings": {"one": one, "two": two},
                    "rows": [asdict(row) for row in (*kept, *rows)],
                }  # fmt: skip
                arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    print(table(rows))
    if missed := shortfalls(rows):
        sys.exit("\n".join(missed))


def _compare_dtypes(arguments: argparse.Namespace) -> None:
    from . import meaning_dtypes as dtypes

    if arguments.dtypes not in dtypes.MODELS:
        sys.exit(f"--dtypes must be one of {', '.join(dtypes.MODELS)}, not {arguments.dtypes!r}")
    rows = dtypes.compare(arguments.dtypes, arguments.count, arguments.engine)
    print(dtypes.table(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps({**facts(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if missed := dtypes.shortfalls(rows):
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
