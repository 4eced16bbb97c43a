"""Pictures on a GPU: our engines against diffusers, eager and compiled, in one process, taking turns.

    vega-edge bench gpu BUNDLE [BUNDLE ...] -o benchmarks/results/gpu.json

Each bundle's own defaults say how many steps, how much guidance and what size; random weights take the same time as
trained ones. Every side walks with Euler, one evaluation of the U-Net a step. The peers are built from the bundle's
configurations, so that both sides are the same networks: fp16, channels_last, the decoder in the precision that ours has;
compiled includes CUDA graphs in each of its modes.
Exit status 1 where a goal of the project is missed. `--device cpu` runs the same on a CPU, to try the program itself, and
judges nothing.
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

from .. import Pipeline
from ..bundle import Bundle
from ..engines import EngineStatus, available
from ..engines.checked import CheckedEngine
from ..errors import EngineError
from ..models import find_bundle
from .gpu_peers import COMPILE_MODES, flops, free_bytes, matmul_peak, peer, pipeline_flops
from .gpu_report import PEERS, captured, shortfalls, summary, table
from .machine import facts

PROMPT = "a big red star on a blue background"
_FIRST = """
import contextlib, sys, time
start = time.perf_counter()
from vega_edge import Pipeline
with contextlib.closing(Pipeline.open(sys.argv[1], sys.argv[2], device=sys.argv[3])) as pipe:
    pipe({prompt!r})
    print(time.perf_counter() - start)
""".replace("{prompt!r}", repr(PROMPT))
_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="vega-edge bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="models' names or bundles' folders")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu; default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--steps", type=int, help="of every side; default: the bundle's own")
    parser.add_argument("--size", type=int, metavar="PX", help="width and height; default: the bundle's own")
    parser.add_argument("--runs", type=int, default=20, help="of each side; default: %(default)s")
    parser.add_argument("--warm", type=int, default=3, help="rounds that don't count; default: %(default)s")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--compile-mode", default="max-autotune", choices=COMPILE_MODES,
        help="of the compiled peer; the first tries kernels for minutes; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--no-first-picture", action="store_true", help="leave out the time from a new process to its first picture"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(argv)
    _check_device(arguments.device)
    peak = matmul_peak(arguments.device)
    rows = []
    for folder in map(find_bundle, arguments.bundles):
        rows += measure(folder, arguments, peak)
    result = {**facts(), "gpu": _gpu(arguments.device), "matmul_tflops": round(peak / 1e12, 2), "rows": rows}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    if arguments.device != "cpu" and (missed := shortfalls(rows)):
        raise SystemExit("\n".join(missed))


def _check_device(device: str) -> None:
    """EngineError unless torch, the peers' library, can use it."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise EngineError(
            f"torch {torch.__version__} finds no GPU here, and the peers run on one: install torch for CUDA, or try the program "
            "with --device cpu"
        )


def measure(folder: Path, arguments: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """One row for each batch: ours and each peer's numbers, and the ratios of their medians."""
    bundle, device = Bundle.open(folder), arguments.device
    free = free_bytes(device)
    with contextlib.closing(Pipeline.open(folder, arguments.engine, device=device)) as pipe:
        settings = {key: pipe.defaults[key] for key in ("steps", "guidance", "width", "height")}
        settings["steps"] = arguments.steps or settings["steps"]
        if arguments.size:
            settings |= {"width": arguments.size, "height": arguments.size}
        work = {part: flops(bundle, part, settings) for part in ("text", "denoise", "decode")}
        memory = {}
        for batch in arguments.batches:  # before there is any peer, whose allocator keeps what it once had
            draw_ours(pipe, settings, 0, batch)
            memory[batch] = free - free_bytes(device)
        rows = []
        for batch in arguments.batches:
            row = {"model": pipe.name, "engine": pipe.engine, "batch": batch, **settings}
            times, taken_bytes = _beside(bundle, pipe, settings, batch, arguments)
            total = pipeline_flops(work, settings, batch)
            row["sides"] = {name: summary(taken, batch, total, peak) for name, taken in times.items()}
            ours = row["sides"]["ours"]["p50_s"]
            row["ratios"] = {name: round(row["sides"][name]["p50_s"] / ours, 3) for name in arguments.peers}
            row["device_bytes"] = {"ours": memory[batch], **taken_bytes}
            row["cuda_graphs"] = _cuda_graphs(pipe)
            if "compiled" in arguments.peers:
                row["compile_mode"] = arguments.compile_mode
            rows.append(row)
    seconds = None if arguments.no_first_picture else first_picture(folder, arguments.engine, device)
    return [{**row, "first_picture_s": seconds} for row in rows]


def _beside(
    bundle: Bundle, pipe: Pipeline, settings: dict[str, Any], batch: int, arguments: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, int]]:
    """Times of ours and of each peer, and the bytes that each peer takes on the device."""
    sides: dict[str, Callable[[int], dict[str, float]]] = {"ours": lambda seed: draw_ours(pipe, settings, seed, batch)}
    memory = {}
    with contextlib.ExitStack() as stack:
        for name in arguments.peers:
            before = free_bytes(arguments.device)
            mode = arguments.compile_mode if name == "compiled" else None
            made = peer(bundle, settings, arguments.device, compile_mode=mode, batch=batch)
            stack.callback(made.close)
            sides[name] = made
            made(0)
            memory[name] = before - free_bytes(arguments.device)
            check_calls(name, made.calls, settings["steps"])
        return turns(sides, arguments.runs, arguments.warm), memory


def _cuda_graphs(pipe: Pipeline) -> dict[str, int | None]:
    """Of each engine that is open, how many it has captured so far: one that can't be captured runs on without, slower."""
    engines: list[Any] = [part._engine for part in pipe._parts._made.values() if part._engine is not None]
    return {engine._label.split(", ")[1]: captured(engine) for engine in engines}


def check_calls(side: str, calls: int, steps: int) -> None:
    """Exits unless a picture took one evaluation of the U-Net a step: sides that do different work can't be compared."""
    if calls != steps:
        raise SystemExit(f"{side} ran its U-Net {calls} times for {steps} steps; nothing was compared")


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


def draw_ours(pipe: Pipeline, settings: dict[str, Any], seed: int, batch: int) -> dict[str, float]:
    """With one evaluation of the U-Net a step, as the peers. Both texts are others each time, since they are remembered,
    and neither is left out, which would save a model that takes zeros then a run of its encoders."""
    with engine_calls() as inside:
        start = time.perf_counter()
        result = pipe(
            f"{PROMPT}, number {seed}", negative=f"a small one, number {seed}", seed=seed, samples=batch,
            scheduler="Euler", family="diffusers", steps=settings["steps"], width=settings["width"], height=settings["height"],
        )  # fmt: skip
        total = time.perf_counter() - start
    check_calls("ours", sum(is_unet for is_unet, _ in inside), settings["steps"])
    return {**result.timings, "outside the engines": total - sum(seconds for _, seconds in inside)}


@contextlib.contextmanager
def engine_calls() -> Iterator[list[tuple[bool, float]]]:
    """Collects (is it the U-Net's, seconds) of each call of an engine, while it is open."""
    run, calls = CheckedEngine.run, list[tuple[bool, float]]()

    def timed(self: CheckedEngine, feeds: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(self, feeds)
        finally:
            calls.append(("timestep" in self.inputs, time.perf_counter() - start))

    CheckedEngine.run = timed  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        CheckedEngine.run = run  # type: ignore[method-assign]


def first_picture(folder: Path, engine: str, device: str) -> float:
    """Seconds from a new process to its first picture, the second time: files and kernels are in their caches then."""
    for _ in range(2):
        command = [sys.executable, "-c", _FIRST, str(folder), engine, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the first picture failed: {done.stderr.strip().splitlines()[-1]}")
    return round(float(done.stdout), 3)


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
        found["driver"] = _driver_version(index)
    return found


def _driver_version(index: int) -> str:
    """'570.86.15', or '' where nvidia-smi is not there to say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


if __name__ == "__main__":
    main()
