"""Do the embedded models still draw what they are told in fewer bits? `python -m vega_edge.bench.meaning --dtypes`.

Each dtype is exported to a folder that vanishes afterwards, and draws the same prompts with the same seeds as fp32.
Goals of the project: int8 loses at most 2 points of the checker's accuracy, and its U-Net's files are at most 0.55 times
fp16's; the other dtypes are held to the first too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..engines.dtypes import refusal
from .machine import markdown
from .meaning import BASE, Setting, evaluate, few
from .meaning_rows import Row

DTYPES = ("fp32", "fp16", "bf16", "int8")
POINTS, RATIO = 2.0, 0.55
_INSTEAD = "openvino"  # for a dtype that the engine asked for does not run
_OPTIONS = {"demo-vega": BASE, "demo-vegart": few(4)}
MODELS = tuple(_OPTIONS)


@dataclass
class DtypeRow:
    """`unet_bytes`: of the U-Net's graph and weights; `unet_ratio` to fp16's, `points_lost` to fp32's."""

    dtype: str
    engine: str
    unet_bytes: int
    unet_ratio: float
    points_lost: float
    drawn: Row


def compare(model: str, count: int, engine: str, dtypes: tuple[str, ...] = DTYPES) -> list[DtypeRow]:
    """One row for each dtype, of `count` prompts."""
    rows: list[DtypeRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            bundle = Path(folder) / f"{model}-{dtype}"
            command = [sys.executable, "-m", "vega_edge", "export", model, "--dtype", dtype, "-o", str(bundle)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            on = _INSTEAD if refusal(engine, (dtype, dtype)) else engine
            drawn = evaluate(Setting(f"{model}, {dtype}", str(bundle), "seen", _OPTIONS[model]), count, on, None)
            size = sum(file.stat().st_size for file in (bundle / "unet").glob("model.onnx*"))
            rows.append(DtypeRow(dtype, on, size, 0.0, 0.0, drawn))
    return relate(rows)


def relate(rows: list[DtypeRow]) -> list[DtypeRow]:
    by_dtype = {row.dtype: row for row in rows}
    for row in rows:
        row.unet_ratio = round(row.unet_bytes / by_dtype["fp16"].unet_bytes, 3)
        row.points_lost = round(by_dtype["fp32"].drawn.all - row.drawn.all, 1)
    return rows


def shortfalls(rows: list[DtypeRow]) -> list[str]:
    """The goals that are missed, in words."""
    found = [f"{r.drawn.title}: {r.points_lost} points lost, goal {POINTS:g}" for r in rows if r.points_lost > POINTS]
    large = (r for r in rows if r.dtype == "int8" and r.unet_ratio > RATIO)
    return [*found, *(f"{r.drawn.title}: the U-Net is {r.unet_ratio} times fp16's, goal {RATIO}" for r in large)]


def table(rows: list[DtypeRow]) -> str:
    head = ("setting", "engine", "prompts", "all right", "points lost", "U-Net MB", "of fp16's", "s a picture")
    lines = [
        (r.drawn.title, r.engine, r.drawn.count, f"**{r.drawn.all:.1f} %**", f"{r.points_lost:.1f}",
         f"{r.unet_bytes / 1e6:.1f}", f"{r.unet_ratio:.2f}", f"{r.drawn.seconds_a_picture:.2f}")
        for r in rows
    ]  # fmt: skip
    return markdown(head, lines)
