"""The list of schedulers, for people and for programs."""

from __future__ import annotations

from typing import Any

from .schedulers import SCHEDULES, all_schedulers


def to_dict() -> dict[str, Any]:
    """schedulers: one record each, as `Scheduler` has it. schedules: what `--schedule` takes."""
    rows = [
        {
            "name": s.name, "family": s.family, "order": s.order, "calls": s.calls, "least_steps": s.least_steps,
            "stochastic": s.stochastic, "brownian": s.brownian is not None, "eta": s.eta, "any_schedule": s.any_schedule,
        }
        for s in all_schedulers()
    ]  # fmt: skip
    return {"schedulers": rows, "schedules": list(SCHEDULES)}


def render() -> str:
    """A table: family, name, order of convergence and model calls a step; what is special beside it."""
    rows = to_dict()["schedulers"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'family':<9}  {'name':<{width}}  order   calls a step"]
    for row in rows:
        order, calls = ("varies" if row[key] is None else f"{row[key]:g}" for key in ("order", "calls"))
        notes = [
            "random" if row["stochastic"] else "",
            f"at least {row['least_steps']} steps" if row["least_steps"] > 1 else "",
            "" if row["any_schedule"] else "own schedule only",
        ]
        special = ", ".join(note for note in notes if note)
        lines.append(f"{row['family']:<9}  {row['name']:<{width}}  {order:<6}  {calls:<12}  {special}".rstrip())
    orders = "order: of convergence as measured with many steps, the first ones, of lower order, included"
    return "\n".join([*lines, "", orders, f"--schedule, for all the others: {', '.join(SCHEDULES)}"])
