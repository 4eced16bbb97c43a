"""Pictures on a GPU: our engines against diffusers, eager and compiled, in one process, taking turns.

    python -m vega_edge.bench.gpu BUNDLE [BUNDLE ...] -o bench/results/gpu.json

Each bundle's own defaults say how many steps, how much guidance and what size; random weights take the same time as
trained ones. The peers are built from the bundle's configurations, so that both sides are the same networks: fp16,
channels_last, the decoder in the precision that ours has; compiled means max-autotune, which includes CUDA graphs.
Bundles for onnxruntime-cuda: export them with --attention. `--device cpu` runs the same on a CPU, to try the program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import Pipeline
from ..bundle import Bundle
from ..engines import EngineStatus, available
from ..engines.checked import CheckedEngine
from ..errors import EngineError
from ..models import find_bundle
from .gpu_peers import Peer, flops, matmul_peak, peer, pipeline_flops
from .machine import facts, markdown

PROMPT = "a big red star on a blue background"
PEERS = ("eager", "compiled")
_FIRST = """
import sys, time
start = time.perf_counter()
from vega_edge import Pipeline
Pipeline.open(sys.argv[1], sys.argv[2], device=sys.argv[3])({prompt!r})
print(time.perf_counter() - start)
""".replace("{prompt!r}", repr(PROMPT))
_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="models' names or bundles' folders")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu; default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--runs", type=int, default=20, help="of each side; default: %(default)s")
    parser.add_argument("--warm", type=int, default=3, help="rounds that don't count; default: %(default)s")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    peak = matmul_peak(arguments.device)
    rows = []
    for folder in map(find_bundle, arguments.bundles):
        rows += measure(folder, arguments, peak)
    result = {**facts(), "gpu": _gpu(arguments.device), "matmul_tflops": round(peak / 1e12, 2), "rows": rows}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


def measure(folder: Path, arguments: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """One row for each batch: ours and each peer's numbers, and the ratios of their medians."""
    bundle, device = Bundle.open(folder), arguments.device
    free = _free_bytes(device)
    pipe = Pipeline.open(folder, arguments.engine, device=device)
    work = {part: flops(bundle, part, pipe.defaults) for part in ("text", "denoise", "decode")}
    rows = []
    memory = {}
    for batch in arguments.batches:
        _ours(pipe, 0, batch)
        memory["ours"] = free - _free_bytes(device)
        sides: dict[str, Callable[[int], dict[str, float]]] = {"ours": lambda seed, n=batch: _ours(pipe, seed, n)}  # type: ignore[misc]
        with contextlib.ExitStack() as stack:
            for name in arguments.peers:
                before = _free_bytes(device)
                sides[name] = stack.enter_context(_peer(bundle, pipe, name, device, batch))
                sides[name](0)
                memory[name] = before - _free_bytes(device)
            times = turns(sides, arguments.runs, arguments.warm)
        row = {"model": pipe.name, "engine": pipe.engine, "batch": batch, **_settings(pipe)}
        total = pipeline_flops(work, pipe.defaults, batch)
        row["sides"] = {name: summary(taken, batch, total, peak) for name, taken in times.items()}
        ours = row["sides"]["ours"]["p50_s"]
        row["ratios"] = {name: round(row["sides"][name]["p50_s"] / ours, 3) for name in arguments.peers}
        row["device_bytes"] = dict(memory)
        rows.append(row)
    pipe.close()
    seconds = first_picture(folder, arguments.engine, device)
    for row in rows:
        row["first_picture_s"] = seconds
    return rows


def turns(
    sides: dict[str, Callable[[int], dict[str, float]]], runs: int, warm: int
) -> dict[str, list[dict[str, float]]]:
    """Each side in turn, so that what the machine does besides meets all alike; the first `warm` rounds don't count."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for i in range(warm + runs):
        for name, draw in sides.items():
            start = time.perf_counter()
            parts = draw(i)
            seconds = time.perf_counter() - start
            if i >= warm:
                taken[name].append({**parts, "all": seconds})
    return taken


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


def _ours(pipe: Pipeline, seed: int, batch: int) -> dict[str, float]:
    with engine_seconds() as inside:
        start = time.perf_counter()
        result = pipe(PROMPT, seed=seed, samples=batch)
        total = time.perf_counter() - start
    return {**result.timings, "outside the engines": total - sum(inside)}


@contextlib.contextmanager
def engine_seconds() -> Iterator[list[float]]:
    """Collects how long each call of an engine takes, while it is open."""
    run, seconds = CheckedEngine.run, list[float]()

    def timed(self: CheckedEngine, feeds: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(self, feeds)
        finally:
            seconds.append(time.perf_counter() - start)

    CheckedEngine.run = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        CheckedEngine.run = run  # type: ignore[method-assign]


@contextlib.contextmanager
def _peer(bundle: Bundle, pipe: Pipeline, name: str, device: str, batch: int) -> Iterator[Peer]:
    made = peer(bundle, pipe.defaults, device, compiled=name == "compiled", batch=batch, prompt=PROMPT)
    try:
        yield made
    finally:
        made.close()


def first_picture(folder: Path, engine: str, device: str) -> float:
    """Seconds from a new process to its first picture, the second time: files and kernels are in their caches then."""
    for _ in range(2):
        command = [sys.executable, "-c", _FIRST, str(folder), engine, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the first picture failed: {done.stderr.strip().splitlines()[-1]}")
    return round(float(done.stdout), 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = [
        "model",
        "engine",
        "batch",
        "ours p50 / p95 s",
        "pictures/s",
        "TFLOP/s (of peak)",
        "outside",
        "first",
        *PEERS,
    ]
    body = []
    for row in rows:
        ours = row["sides"]["ours"]
        outside = ours["parts"]["outside the engines"]["p50_s"] / ours["p50_s"]
        peers = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "-" for name in PEERS]
        body.append([
            row["model"], row["engine"], row["batch"], f"{ours['p50_s']:.3f} / {ours['p95_s']:.3f}", ours["pictures_per_s"],
            f"{ours['tflops']} ({ours['share_of_peak']:.0%})", f"{outside:.1%}", f"{row['first_picture_s']} s", *peers,
        ])  # fmt: skip
    return markdown(head, body)


def _settings(pipe: Pipeline) -> dict[str, Any]:
    return {key: pipe.defaults[key] for key in ("steps", "guidance", "width", "height")}


def _free_bytes(device: str) -> int:
    """Of the whole GPU; 0 on a CPU, where it would mean something else."""
    if device == "cpu":
        return 0
    from ..engines.cuda import CudaDevice

    with contextlib.closing(CudaDevice(int(device.partition(":")[2] or 0))) as gpu:
        return gpu.memory()[0]


def _gpu(device: str) -> dict[str, Any]:
    """What the numbers were measured on beside the CPU."""
    states: list[EngineStatus] = available()
    found: dict[str, Any] = {"engines": {s.name: f"{s.version} on {s.device}" for s in states if s.ok}}
    if device != "cpu":
        from ..engines import nvidia

        index = int(device.partition(":")[2] or 0)
        with contextlib.suppress(EngineError):
            found |= {"name": nvidia.devices()[index], "capability": nvidia.compute_capability(index)}
            found["driver_cuda"] = ".".join(map(str, nvidia.driver_cuda()))
    return found


if __name__ == "__main__":
    main()
