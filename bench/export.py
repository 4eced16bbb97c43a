"""What an export costs: time and peak memory of each part, against the size of its weights.

    python -m vega_edge.bench.export segmind-vega --random-weights 7 -o benchmarks/results/export-vega-fp16.json
    python -m vega_edge.bench.export sdxl-lightning --random-weights 7 -o benchmarks/results/export-sdxl-lightning-fp16.json

What is exported is named as for `vega-edge export`. It runs in a process of its own, whose resident memory is read as the
system counts it (files that are mapped included) while each part is under way. On a machine that others use too, the
processor's seconds say more than the clock's; both are told. The project's goals are in the result, each with what was
measured; exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .machine import facts, markdown

_CHILD = """
import json, sys, time
from pathlib import Path
from vega_edge.export import export_bundle, model_source
def progress(at):
    print(json.dumps({"part": at.part, "phase": at.phase, "cpu_s": time.process_time()}), flush=True)
options = json.loads(sys.argv[3])
source = model_source(sys.argv[1], random_weights=options.pop("random_weights"))
report = export_bundle(source, Path(sys.argv[2]), progress=progress, **options)
print(json.dumps({"part": "", "phase": "end", "cpu_s": time.process_time(), "notes": list(report.notes)}), flush=True)
"""


# On two cores, in fp16: of one part, or of the whole export where part is None.
GOALS: dict[str, tuple[tuple[str | None, str, float], ...]] = {
    "segmind-vega": (("unet", "clock_s", 90.0), ("unet", "peak_over_weights", 1.6)),
    "sdxl-lightning": ((None, "peak_bytes", 12e9),),
}


def measure(source: str, out: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a part: bytes of its weights file, seconds, processor seconds, largest resident memory while it ran."""
    import psutil

    command = [sys.executable, "-c", _CHILD, source, str(out), json.dumps(options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched, peak = psutil.Process(child.pid), [0]

    def watch() -> None:
        while child.poll() is None:
            try:
                peak[0] = max(peak[0], watched.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    rows: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    assert child.stdout is not None
    for line in child.stdout:
        mark = json.loads(line) | {"clock_s": time.monotonic(), "peak": peak[0]}
        if marks:
            rows.append(_phase(marks[-1], mark))
        marks.append(mark)
        peak[0] = 0
    if child.wait() != 0:
        sys.exit(f"the export ended with status {child.returncode}")
    for row in rows:
        row["weights_bytes"] = (out / row["part"] / "model.onnx_data").stat().st_size
    return rows


def _phase(begun: dict[str, Any], ended: dict[str, Any]) -> dict[str, Any]:
    return {
        "part": begun["part"], "phase": begun["phase"], "clock_s": round(ended["clock_s"] - begun["clock_s"], 1),
        "cpu_s": round(ended["cpu_s"] - begun["cpu_s"], 1), "peak_bytes": ended["peak"],
    }  # fmt: skip


def by_part(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = dict.fromkeys(row["part"] for row in rows)
    found = []
    for part in parts:
        own = [row for row in rows if row["part"] == part]
        peak, weights = max(row["peak_bytes"] for row in own), own[0]["weights_bytes"]
        found.append(
            {
                "part": part, "weights_bytes": weights, "clock_s": round(sum(row["clock_s"] for row in own), 1),
                "cpu_s": round(sum(row["cpu_s"] for row in own), 1), "peak_bytes": peak,
                "peak_over_weights": round(peak / weights, 2),
            }
        )  # fmt: skip
    return found


def held_against_goals(source: str, dtype: str, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a goal: what, got, goal, met."""
    whole = {"peak_bytes": max(part["peak_bytes"] for part in parts)}
    found: list[dict[str, Any]] = []
    if dtype != "fp16":
        return found
    for name, figure, goal in GOALS.get(source, ()):
        row = whole if name is None else next(part for part in parts if part["part"] == name)
        what = f"{name or 'whole export'}, {figure}"
        found.append({"what": what, "got": row[figure], "goal": goal, "met": row[figure] <= goal})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a model's name, a diffusers folder, or another that `vega-edge export` takes")
    parser.add_argument("--random-weights", type=int, metavar="SEED")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--weights")
    parser.add_argument(
        "--keep", type=Path, metavar="BUNDLE", help="where the bundle stays; default: it is thrown away"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("dtype", "weights", "random_weights")}
    with tempfile.TemporaryDirectory() as folder:
        phases = measure(arguments.source, arguments.keep or Path(folder) / "bundle", options)
    parts = by_part(phases)
    print(
        markdown(
            ("part", "weights", "clock", "processor", "peak memory", "of the weights"),
            [
                (p["part"], f"{p['weights_bytes'] / 1e9:.2f} GB", f"{p['clock_s']} s", f"{p['cpu_s']} s",
                 f"{p['peak_bytes'] / 1e9:.2f} GB", f"{p['peak_over_weights']:.2f} x")
                for p in parts
            ],
        )
    )  # fmt: skip
    goals = held_against_goals(arguments.source, arguments.dtype, parts)
    if arguments.output:
        load = os.getloadavg() if hasattr(os, "getloadavg") else ()
        told = {**facts(), "source": Path(arguments.source).name, **options, "load": load, "goals": goals}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**told, "parts": parts, "phases": phases}, indent=1) + "\n")
    if missed := [f"{g['what']}: {g['got']:g}, goal {g['goal']:g}" for g in goals if not g["met"]]:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
