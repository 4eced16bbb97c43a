"""Real models at their real size: export, verify, and draw at 512 px on each CPU engine, with random weights.

    python -m benchmarks.real_size -o benchmarks/results/real-size.json
    python -m benchmarks.real_size tiny-sd --precisions int8 --keep build/real-size
    python -m benchmarks.real_size --keep build/real-size --only export   # then, on an idle machine: --only draw

Each command runs in a process of its own, one after another; its peak memory is the resident set that the system
reports (mapped pages count). `cpu_s`: of all its threads, which other work on the machine changes little. A pipeline
draws two images and the second is timed. Latents are compared with those of the model's fp32 on onnxruntime-cpu, if that
was drawn in this run or is kept, as a share of their standard deviation: random weights draw near-flat images, so a
signal-to-noise ratio of pixels would prove nothing. Rows that the file already has, and that are not asked for, stay.
Exit status 1 if a cell failed for another reason than that its engine refuses the precision.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vega_edge.bench.machine import facts, markdown, peak_mb
from vega_edge.engines import ENGINES, available, runs_on_cpu
from vega_edge.engines.dtypes import refusal
from vega_edge.runtime.memory import weight_bytes

MODELS = ("tiny-sd", "small-sd", "segmind-vegart")
# --dtype/--weights
PRECISIONS = {"fp32": ("fp32", "fp16"), "fp16": ("fp16", "fp16"), "bf16": ("bf16", "bf16"), "int8": ("int8", "int8")}
FIRST = "fp32"  # the others are compared with it
PROMPT, SEED, SIDE_PX, STEPS = "a portrait of an old fisherman in a yellow raincoat", 7, 512, 4
TIMEOUT_S = 1800


def draw(bundle: Path, engine: str, latents: Path) -> dict[str, Any]:
    """Open the bundle, draw twice and save the latents, in this process."""
    from vega_edge import Pipeline, VegaEdgeError

    try:
        start = time.perf_counter()
        with Pipeline.open(bundle, engine, verify=False) as pipe:
            opened = time.perf_counter() - start
            opened_gib = peak_mb() / 1024
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                result = pipe(PROMPT, seed=SEED, steps=STEPS, width=SIDE_PX, height=SIDE_PX)
                seconds.append(time.perf_counter() - start)
        np.save(latents, result.latents)
        return {
            "open_s": round(opened, 1),
            "first_s": round(seconds[0], 2),
            "image_s": round(seconds[1], 2),
            "stages_s": {name: round(s, 2) for name, s in result.timings.items()},
            "guidance": result.request.guidance,
            "opened_gib": round(opened_gib, 1),
            "peak_gib": round(peak_mb() / 1024, 1),
            "pixels_std": round(float(np.asarray(result.images[0]).std()), 2),
        }
    except VegaEdgeError as error:
        return {"error": str(error)}


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a Python module; return seconds, peak memory, and as "error" the last line of its errors if it failed."""
    start = time.monotonic()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=out, stderr=errors)
        deadline = start + TIMEOUT_S
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    failure = {"error": f"exit status {process.returncode}: {lines[-1] if lines else ''}"} if process.returncode else {}
    return {
        "seconds": round(time.monotonic() - start),
        "cpu_s": round(usage.ru_utime + usage.ru_stime),
        "peak_gib": round(usage.ru_maxrss / (1 << 20), 1),
        **failure,
    }


def export(model: str, name: str, bundle: Path, folder: Path) -> dict[str, Any]:
    """Export and verify; return the row."""
    dtype, weights = PRECISIONS[name]
    row: dict[str, Any] = {"model": model, "dtype": dtype, "weights": weights, "load_average": os.getloadavg()[0]}
    options = ["--random-weights", "0", "--dtype", dtype, "--weights", weights, "-o", str(bundle), "--overwrite"]
    row["export"] = run(["vega_edge", "export", model, *options], folder)
    if "error" not in row["export"]:
        row["weight_bytes"] = weight_bytes(bundle)
        row["bundle_gb"] = round(sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / 1e9, 2)
        row["verify"] = run(["vega_edge", "verify", str(bundle)], folder)
    return {**row, "measured": facts()}


def draws(bundle: Path, reference: Path, first: bool, folder: Path) -> dict[str, Any]:
    """Return the part of a row that says what each engine drew. reference: latents to compare with; `first` writes them."""
    row: dict[str, Any] = {"load_average_drawing": os.getloadavg()[0], "engines": {}}
    for engine in (status.name for status in available() if status.ok and runs_on_cpu(status.name)):
        latents = folder / "latents.npy"
        latents.unlink(missing_ok=True)
        done = run(["benchmarks.real_size", "--draw", str(bundle), engine, str(latents)], folder)
        cell = (
            {"error": done["error"]}
            if "error" in done
            else json.loads((folder / "stdout").read_text().splitlines()[-1])
        )
        cell["cpu_s"] = done["cpu_s"]
        if latents.is_file():
            drawn = np.load(latents)
            if first and engine == "onnxruntime-cpu":
                np.save(reference, drawn)
            if reference.is_file():
                wanted = np.load(reference)
                cell["latents_error_of_std"] = float(f"{np.abs(drawn - wanted).max() / wanted.std():.1e}")
        row["engines"][engine] = cell
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        first = [
            row["model"],
            row["dtype"],
            row["weights"],
            f"{row['export']['seconds']} s, {row['export']['peak_gib']} GiB",
        ]
        verified = row.get("verify", {})
        first.append(
            verified.get("error") or f"{verified['seconds']} s" if verified else row["export"].get("error", "")
        )
        for engine, cell in row.get("engines", {"": {}}).items():
            drawn = f"{cell['image_s']} s, {cell['peak_gib']} GiB" if "image_s" in cell else ""
            said = [engine, cell.get("error", drawn)]
            lines.append([*first, *said, cell.get("latents_error_of_std", "")])
    return markdown(
        ("model", "dtype", "weights", "export", "verify", "engine", "an image, peak", "latents, of their std"), lines
    )


def failures(row: dict[str, Any]) -> list[str]:
    cells = {"export": row["export"], "verify": row.get("verify", {}), **row.get("engines", {})}
    where = f"{row['model']} {row['dtype']}/{row['weights']}"
    refused = {name for name in cells if name in ENGINES and refusal(name, (row["dtype"], row["weights"]))}
    return [
        f"{where}, {name}: {cell['error']}" for name, cell in cells.items() if "error" in cell and name not in refused
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the bundles there; default: none is left")
    parser.add_argument(
        "--only", choices=("export", "draw"), help="export, or draw what an earlier run exported and kept"
    )
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)  # bundle, engine, latents: one cell, in this process
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/real-size.json"))
    arguments = parser.parse_args()
    if arguments.only and not arguments.keep:
        parser.error("--only needs --keep")
    if arguments.draw:
        bundle, engine, latents = arguments.draw
        print(json.dumps(draw(Path(bundle), engine, Path(latents))))
        return
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if arguments.output.is_file():
        rows = {
            (row["model"], row["dtype"], row["weights"]): row
            for row in json.loads(arguments.output.read_text())["rows"]
        }
    done = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for model in arguments.models:
            reference = (arguments.keep or folder) / f"{model}.npy"
            for name in arguments.precisions:
                bundle = (arguments.keep or folder) / f"{model}-{name}"
                bundle.parent.mkdir(parents=True, exist_ok=True)
                key = model, *PRECISIONS[name]
                if arguments.only == "draw" and key not in rows:
                    parser.error(f"{arguments.output} has no row of {' '.join(key)}: run --only export first")
                row = rows[key] if arguments.only == "draw" else export(model, name, bundle, folder)
                if arguments.only != "export" and "error" not in row["export"]:
                    row |= draws(bundle, reference, name == FIRST, folder)
                rows[key] = row
                done.append(row)
                if not arguments.keep:
                    shutil.rmtree(bundle, ignore_errors=True)
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n")
                print(table([row]), flush=True)
    if failed := [line for row in done for line in failures(row)]:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
