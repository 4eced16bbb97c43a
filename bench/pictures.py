"""How fast a model draws on this machine: opening it, the first picture, and those after it, on each engine.

What `vega-edge bench` measures. Each engine has a process of its own, so that its peak memory is its own, and its turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError, VegaEdgeError
from ..runtime.pipeline import Pipeline
from .machine import markdown, peak_mb

PROMPT = "a big red star on a blue background"


@dataclass(frozen=True)
class Speed:
    """Of one engine; medians over `rounds` pictures after the first. peak_mb: None where the system does not tell.

    open_s: until a request can be taken. first_s: the first picture, which pays for what is compiled or cached when it
    is first needed. worst_s: the slowest of the others. step_s: one step of the denoising loop.
    """

    engine: str
    open_s: float
    first_s: float
    picture_s: float
    worst_s: float
    text_s: float
    step_s: float
    decode_s: float
    peak_mb: float | None


def measure(model: str, opening: Mapping[str, Any], options: Mapping[str, Any], rounds: int) -> Speed:
    """In this process. opening: of `Pipeline.open`; options: of `Pipeline.request`."""
    start = time.perf_counter()
    pipe = Pipeline.open(model, **opening)
    try:
        open_s = time.perf_counter() - start
        seconds, timings, steps = [], [], 0
        for i in range(rounds + 1):  # another prompt each time: texts are remembered
            request = pipe.request(f"{PROMPT}, {i}", seed=i, **options)
            steps = pipe.total(request) or request.steps
            start = time.perf_counter()
            timings.append(pipe.run(request).timings)
            seconds.append(time.perf_counter() - start)
        stage = {name: statistics.median(t[name] for t in timings[1:]) for name in ("text", "denoise", "decode")}
        return Speed(
            pipe.engine, open_s, seconds[0], statistics.median(seconds[1:]), max(seconds[1:]), stage["text"],
            stage["denoise"] / steps, stage["decode"], None if sys.platform == "win32" else peak_mb(),
        )  # fmt: skip
    finally:
        pipe.close()


def measure_apart(model: str, opening: Mapping[str, Any], options: Mapping[str, Any], rounds: int) -> Speed:
    """`measure` in a process of its own; raises VegaEdgeError with what it failed with."""
    asked = json.dumps({"model": model, "opening": dict(opening), "options": dict(options), "rounds": rounds})
    command = [sys.executable, "-m", "vega_edge.bench.pictures", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # a defect has left its traceback on stderr
        raise VegaEdgeError(f"the process that measured ended with status {done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise (UsageError if answer["usage"] else VegaEdgeError)(answer["error"])
    return Speed(**answer)


def table(speeds: list[Speed]) -> str:
    head = ["engine", "opens", "first picture", "a picture", "slowest", "text", "a step", "decoding", "peak memory"]
    return markdown(head, [_row(speed) for speed in speeds])


def _row(s: Speed) -> list[str]:
    times = (s.open_s, s.first_s, s.picture_s, s.worst_s, s.text_s, s.step_s, s.decode_s)
    return [s.engine, *map(_duration, times), "not told" if s.peak_mb is None else f"{s.peak_mb:.0f} MB"]


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _main() -> None:
    try:
        answer = asdict(measure(**json.loads(sys.argv[1])))
    except VegaEdgeError as error:
        answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
