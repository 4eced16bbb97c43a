"""Peak memory of opening and running a bundle, each engine and way in processes of their own.

    python -m vega_edge.bench.memory BUNDLE [--part unet] [--engines NAME ...] -o benchmarks/results/memory.json

Three ways: normal without a cache; --memory low with an empty cache (cold); the same again (warm). For each part alone,
which is what the goals are about, or with `--part all` for a whole picture. Two numbers: all resident memory, and of
that the anonymous: a file's pages that are mapped count in the first, but the system takes them back when it must.
Ratios are to the size of the part's weights on disk, beyond what the process held before it opened anything. The goals
for a U-Net stored in fp16 are in the result, each with what was measured; exit status 1 where one is missed.
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

import numpy as np

from ..bundle import Bundle
from ..engines import Spec, available
from ..models import find_bundle
from ..runtime.memory import weight_bytes
from ..runtime.parts import Parts
from ..runtime.pipeline import Pipeline
from ..runtime.tokenizer import TOKENS
from .machine import facts, markdown

WAYS = ("normal", "low, cold", "low, warm")
GOALS = {"low, cold": 2.7, "low, warm": 1.6}  # resident memory over the weights of a U-Net stored in fp16, on OpenVINO
_MB = 1 << 20


class Peaks:
    """The largest resident and anonymous memory, looked at every 5 ms on a thread. Linux."""

    def __init__(self) -> None:
        self.resident = self.anonymous = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self.before = _memory_mb()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            resident, anonymous = _memory_mb()
            self.resident, self.anonymous = max(self.resident, resident), max(self.anonymous, anonymous)


def _memory_mb() -> tuple[float, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return kilobytes["VmRSS"] / 1024, kilobytes["RssAnon"] / 1024


def feeds_of(inputs: Any, latent: int) -> dict[str, Any]:
    """Numbers of the right shape: latents of `latent` x `latent`, one sample."""
    sizes = {"batch": 1, "height": latent, "width": latent, "sequence_length": TOKENS}

    def shape(spec: Spec, name: str) -> list[int]:
        free = [1, None, latent, latent] if name in ("sample", "latent_sample") else [1, TOKENS, 6]
        return [d if isinstance(d, int) else sizes.get(str(d), f or 1) for d, f in zip(spec.shape, free, strict=False)]

    return {name: np.ones(shape(spec, name), spec.dtype) for name, spec in inputs.items()}


def measure(bundle: Path, part: str, engine: str, low: bool, cache: Path | None, latent: int) -> dict[str, float]:
    """In this process: open, run twice, close."""
    opened = Bundle.open(bundle, verify=False)
    start = time.perf_counter()
    with Peaks() as peaks:
        if part == "all":
            pipe = Pipeline.open(bundle, engine, verify=False, memory="low" if low else "normal")
            open_s = time.perf_counter() - start
            pipe("a star", steps=1, seed=1)
            run_s = time.perf_counter() - start - open_s
        else:
            file = f"{part}/pixels.onnx" if opened.has(f"{part}/pixels.onnx") else f"{part}/model.onnx"
            with Parts(opened, engine, None, low, cache).part(file).running() as graph:
                open_s = time.perf_counter() - start
                graph.run(given := feeds_of(graph.inputs, latent))
                start = time.perf_counter()
                graph.run(given)
                run_s = time.perf_counter() - start
    resident, anonymous = peaks.before
    return {
        "open_s": open_s, "run_s": run_s, "resident_mb": peaks.resident - resident,
        "anonymous_mb": peaks.anonymous - anonymous,
    }  # fmt: skip


def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    sizes = weight_bytes(Bundle.open(arguments.bundle, verify=False).path)
    weights_mb = (sum(sizes.values()) if arguments.part == "all" else sizes[arguments.part]) / _MB
    for engine in arguments.engines:
        with tempfile.TemporaryDirectory() as home:
            for way in WAYS:
                # A bundle's path must not be looked for in the temporary home, which holds the cache alone.
                command = [
                    sys.executable,
                    "-m",
                    "vega_edge.bench.memory",
                    str(arguments.bundle.absolute()),
                    "--one",
                    way,
                ]
                command += ["--part", arguments.part, "--engines", engine, "--latent", str(arguments.latent)]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, "VEGA_EDGE_HOME": home}, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{engine}, {way}: {done.stderr.strip()[-300:]}")
                found = json.loads(done.stdout)
                found |= {f"{k}_ratio": found[f"{k}_mb"] / weights_mb for k in ("resident", "anonymous")}
                results[f"{engine}, {way}"] = {**found, "weights_mb": weights_mb}
    return results


def held_against_goals(results: dict[str, dict[str, Any]], part: str, weights: str) -> list[dict[str, Any]]:
    """One row a goal: what, got, goal, met."""
    rows: list[dict[str, Any]] = []
    if (part, weights) != ("unet", "fp16"):
        return rows
    for name, found in results.items():
        engine, _, way = name.partition(", ")
        if engine.startswith("openvino") and way in GOALS:
            got = round(found["resident_ratio"], 2)
            rows.append({"what": name, "got": got, "goal": GOALS[way], "met": got <= GOALS[way]})
    return rows


def main() -> None:
    if not sys.platform.startswith("linux"):
        raise SystemExit("this measurement reads /proc, so it needs Linux")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a model's name or a bundle's folder")
    parser.add_argument("--part", default="unet")
    here = [status.name for status in available() if status.ok and status.name != "onnxruntime-cuda"]
    parser.add_argument("--engines", nargs="+", default=here)
    parser.add_argument("--latent", type=int, default=32, help="latents a side; activations grow with its square")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    arguments.bundle = find_bundle(arguments.bundle)
    if arguments.one:
        low = arguments.one != "normal"
        cache = Path(os.environ["VEGA_EDGE_HOME"]) / "compiled" if low else None
        print(json.dumps(measure(arguments.bundle, arguments.part, arguments.engines[0], low, cache, arguments.latent)))
        return
    results = run_all(arguments)
    rows = [
        (name, f"{r['resident_mb']:.0f} MB", f"{r['resident_ratio']:.2f}", f"{r['anonymous_mb']:.0f} MB", f"{r['anonymous_ratio']:.2f}", f"{r['open_s']:.1f} s", f"{r['run_s']:.2f} s")
        for name, r in results.items()
    ]  # fmt: skip
    print(
        markdown(
            [
                f"{arguments.part} of {arguments.bundle.name}",
                "resident",
                "of weights",
                "anonymous",
                "of weights",
                "open",
                "run",
            ],
            rows,
        )
    )
    manifest = Bundle.open(arguments.bundle, verify=False).manifest
    goals = held_against_goals(results, arguments.part, str(manifest.weights) if manifest else "")
    if arguments.output:
        arguments.output.parent.mkdir(exist_ok=True)
        told = {**facts(), "bundle": arguments.bundle.name, "part": arguments.part, "goals": goals, "results": results}
        arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    if missed := [f"{g['what']}: {g['got']} of the weights, goal {g['goal']}" for g in goals if not g["met"]]:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
