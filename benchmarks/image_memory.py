"""Peak memory of drawing one image, measured and estimated, for bundles, sizes and engines.

    python -m benchmarks.image_memory BUNDLE... [--engines NAME ...] [--sizes PX ...] [--memory low]
        -o benchmarks/results/image-memory.json

Each row is a process of its own, one guided image in two steps, twice; the second is timed. `opened_gb`: resident memory
once the pipeline is open; `peak_gb`: the largest while it is opened and drawn; `beyond_opened_gb`: their difference, which
is what a drawing is refused for. The estimates of `runtime/footprint.py` are beside each, `ratio` and `ratio_beyond` are
estimate over measurement. A row of a result file is replaced when it is measured again. All in 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vega_edge.bench.machine import facts, markdown
from vega_edge.bundle import Bundle
from vega_edge.engines import available, runs_on_cpu
from vega_edge.runtime.footprint import Drawing, Footprint
from vega_edge.runtime.memory import weight_bytes

GUIDANCE = 1.5  # any above 1 evaluates two samples


def status_gb(key: str) -> float:
    """Return VmRSS (now) or VmHWM (the largest so far) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e9


def one(bundle: str, engine: str, side: int, memory: str) -> dict[str, float]:
    """In this process."""
    from vega_edge.runtime.pipeline import Pipeline

    start = time.perf_counter()
    with Pipeline.open(bundle, engine, verify=False, memory=memory) as pipe:
        opened, opened_s = status_gb("VmRSS"), time.perf_counter() - start
        for _ in range(2):
            start = time.perf_counter()
            pipe("a star", steps=2, seed=1, guidance=GUIDANCE, width=side, height=side, scheduler="Euler")
        return {
            "opened_gb": opened,
            "open_s": opened_s,
            "draw_s": time.perf_counter() - start,
            "peak_gb": status_gb("VmHWM"),
        }


def estimates(bundle: Path, engine: str, side: int, memory: str) -> tuple[float, float] | None:
    """Of the whole process, and of the drawing beyond what was open."""
    found, drawing = Footprint.of(Bundle.open(bundle, verify=False), engine, memory == "low"), Drawing(side, side)
    return None if found is None else (found.total(drawing) / 1e9, found.running(drawing) / 1e9)


def measure(bundle: Path, engine: str, side: int, memory: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.image_memory",
        "--one",
        engine,
        str(side),
        memory,
        str(bundle),
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"bundle": bundle.name, "engine": engine, "size_px": side, "memory": memory}
    manifest = Bundle.open(bundle, verify=False).manifest
    row["dtype"], row["weights"] = (manifest.dtype, manifest.weights) if manifest else ("", "")
    row["weight_bytes"] = weight_bytes(bundle)
    if found.returncode:
        return {**row, "failed": found.stderr.strip().splitlines()[-1][:300]}
    got = json.loads(found.stdout.strip().splitlines()[-1])
    row |= {key: round(value, 3) for key, value in got.items()}
    row["beyond_opened_gb"] = round(got["peak_gb"] - got["opened_gb"], 3)
    if guess := estimates(bundle, engine, side, memory):
        row |= {"estimated_gb": round(guess[0], 3), "estimated_beyond_gb": round(guess[1], 3)}
        row["ratio"] = round(guess[0] / got["peak_gb"], 3)
        row["ratio_beyond"] = round(guess[1] / max(row["beyond_opened_gb"], 0.001), 3)
    return row


def show(rows: list[dict[str, Any]]) -> str:
    head = (
        "bundle",
        "dtype",
        "engine",
        "memory",
        "px",
        "opened GB",
        "peak GB",
        "estimated GB",
        "estimated / peak",
        "beyond opened GB",
        "estimated / beyond",
        "seconds",
    )
    cells = [
        (r["bundle"], f"{r['dtype']}/{r['weights']}", r["engine"], r["memory"], r["size_px"], r.get("opened_gb", r.get("failed")),
         r.get("peak_gb", ""), r.get("estimated_gb", ""), r.get("ratio", ""), r.get("beyond_opened_gb", ""),
         r.get("ratio_beyond", ""), r.get("draw_s", ""))
        for r in rows
    ]  # fmt: skip
    return markdown(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--engines", nargs="*", default=[s.name for s in available() if s.ok and runs_on_cpu(s.name)])
    parser.add_argument("--sizes", nargs="*", type=int, default=[512])
    parser.add_argument("--memory", default="normal")
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "PX", "MEMORY"), help=argparse.SUPPRESS)
    parser.add_argument("--note", default="", help="kept with each row, such as what else the machine did")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        engine, side, memory = arguments.one
        print(json.dumps(one(str(arguments.bundles[0]), engine, int(side), memory)))
        return
    rows: list[dict[str, Any]] = []
    if arguments.output and arguments.output.is_file():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    for bundle in arguments.bundles:
        for engine in arguments.engines:
            for side in arguments.sizes:
                row = {**measure(bundle, engine, side, arguments.memory), "note": arguments.note, "measured": facts()}
                key = ("bundle", "dtype", "weights", "engine", "size_px", "memory")
                rows = [old for old in rows if [old[k] for k in key] != [row[k] for k in key]] + [row]
                print(json.dumps(row), flush=True)
                if arguments.output:  # after each, so that an interruption keeps what was measured
                    text = json.dumps({"rows": rows}, indent=1) + "\n"
                    arguments.output.write_text(text, encoding="utf-8")
    print(show(rows))


if __name__ == "__main__":
    main()
