"""The rows of `bench.meaning`: their table, which goals they miss, and their file.

A file holds runs, each with its date, commit, engine and versions and with the rows that it measured: a row that is
measured again leaves its old run, so none is ever told to be of another commit than its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .machine import markdown


@dataclass
class Row:
    """color, shape, background, all: per cent right of the prompts that name them. goal: None where it is reported only.

    fit: mean overlap with the ideal outline, 0 to 1, 0 where the shape is wrong. teacher_rms: distance from the 25-step
    guided picture of the same seed, of 255.
    """

    title: str
    prompts: str
    count: int
    color: float
    shape: float
    background: float
    all: float
    goal: float | None
    fit: float
    teacher_rms: float | None
    seconds_a_picture: float

    @property
    def key(self) -> tuple[str, str]:
        return self.title, self.prompts


@dataclass
class Run:
    """`facts`: what `machine.facts` told then, the engine, and the checker's own score on clean renderings."""

    facts: Mapping[str, Any]
    rows: list[Row]


def load(file: Path) -> list[Run]:
    """Of a file that `save` wrote, or of one from before there were runs, which is a single one; [] if there is none."""
    if not file.exists():
        return []
    told = json.loads(file.read_text(encoding="utf-8"))
    runs = told.get("runs", [told])
    return [Run({k: v for k, v in run.items() if k != "rows"}, [Row(**row) for row in run["rows"]]) for run in runs]


def save(file: Path, runs: Sequence[Run]) -> None:
    told = [{**run.facts, "rows": [asdict(row) for row in run.rows]} for run in runs]
    file.write_text(json.dumps({"runs": told}, indent=1) + "\n", encoding="utf-8")


def merged(before: Sequence[Run], new: Run) -> list[Run]:
    """The runs with the new one's rows in place of the same ones before; runs of which nothing is left are gone."""
    again = {row.key for row in new.rows}
    kept = [Run(run.facts, [row for row in run.rows if row.key not in again]) for run in before]
    return [*(run for run in kept if run.rows), new]


def in_order(runs: Sequence[Run], keys: Sequence[tuple[str, str]]) -> list[Row]:
    """All rows in the order of `keys`, whatever run they are of; those that are not among them last."""
    places = {key: i for i, key in enumerate(keys)}
    return sorted((row for run in runs for row in run.rows), key=lambda row: places.get(row.key, len(places)))


def table(rows: Sequence[Row]) -> str:
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


def shortfalls(rows: Sequence[Row]) -> list[str]:
    """What the rows do not show that they should, in words."""
    found = [f"{r.title}, {r.prompts}: {r.all} %, goal {r.goal:g}" for r in rows if r.goal and r.all < r.goal]
    by_key = {r.key: r for r in rows}
    for steps in (2, 4):
        ours = by_key.get((f"demo-vegart, LCM, {steps} steps", "seen"))
        control = by_key.get((f"control: demo-vega without the LoRA, LCM, {steps} steps", "seen"))
        if ours and control and not (ours.all > control.all + 3 and _nearer(ours, control)):
            found.append(f"{steps} steps without the LoRA are not clearly worse than with it")
    return found


def _nearer(ours: Row, control: Row) -> bool:
    assert ours.teacher_rms and control.teacher_rms
    return ours.fit > control.fit and ours.teacher_rms < control.teacher_rms
