"""What the GPU benchmark's times come to: medians, shares, the table, and which goals of the project are missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .machine import markdown

PEERS = ("eager", "compiled")
# at batch 1: how much faster than each peer from prompt to picture
FASTER = {"eager": 1.5, "compiled": 1.1}
OUTSIDE = 0.03  # share of the time that is spent outside the engines, at most
FIRST_S = 2.0  # from a new process to its first picture, caches warm, at most


def summary(taken: list[dict[str, float]], batch: int, work: float, peak: float) -> dict[str, Any]:
    """Medians and 95th percentiles in seconds; TFLOP/s of the work that the networks are, and its share of the peak."""

    def quantile(name: str, q: float) -> float:
        return round(float(np.quantile([each[name] for each in taken], q)), 5)

    parts = {name: {"p50_s": quantile(name, 0.5), "p95_s": quantile(name, 0.95)} for name in taken[0] if name != "all"}
    median = quantile("all", 0.5)
    return {
        "p50_s": median, "p95_s": quantile("all", 0.95), "pictures_per_s": round(batch / median, 3),
        "tflops": round(work / median / 1e12, 2), "share_of_peak": round(work / median / peak, 3), "parts": parts,
    }  # fmt: skip


def captured(engine: Any) -> int | None:
    """How many CUDA graphs an engine holds, as `open_engine` gives it; None for an engine that runs on a CPU."""
    inner = engine._engine
    if hasattr(inner, "captured"):
        return len(inner.captured)
    plans = inner._open.values() if hasattr(inner, "_open") else [inner]
    if not all(hasattr(plan, "_prepared") for plan in plans):
        return None
    return sum(prepared.graph is not None for plan in plans for prepared in plan._prepared.values())


def outside(row: dict[str, Any]) -> float:
    """Share of our time that is spent outside the engines."""
    ours = row["sides"]["ours"]
    return float(ours["parts"]["outside the engines"]["p50_s"] / ours["p50_s"])


def shortfalls(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The goals that the rows of batch 1 miss, in words."""
    found = []
    for row in rows:
        if row["batch"] != 1:
            continue
        for name, goal in FASTER.items():
            if row["ratios"].get(name, goal) < goal:
                found.append(f"{row['model']}: {row['ratios'][name]:.2f}x {name}, goal {goal}x")
        if outside(row) > OUTSIDE:
            found.append(f"{row['model']}: {outside(row):.1%} of the time outside the engines, goal {OUTSIDE:.0%}")
        if (row["first_picture_s"] or 0) > FIRST_S:
            found.append(f"{row['model']}: first picture after {row['first_picture_s']:.1f} s, goal {FIRST_S:g} s")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["model", "engine", "steps", "batch", "ours p50 / p95 s", "pictures/s", "TFLOP/s (of peak)", "GB", "outside", "first", *PEERS]  # fmt: skip
    body = []
    for row in rows:
        ours = row["sides"]["ours"]
        peers = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "-" for name in PEERS]
        body.append([
            row["model"], row["engine"], row["steps"], row["batch"], f"{ours['p50_s']:.3f} / {ours['p95_s']:.3f}",
            ours["pictures_per_s"], f"{ours['tflops']} ({ours['share_of_peak']:.0%})",
            f"{row['device_bytes']['ours'] / 1e9:.1f}", f"{outside(row):.1%}", f"{row['first_picture_s'] or '-'} s", *peers,
        ])  # fmt: skip
    return markdown(head, body)
