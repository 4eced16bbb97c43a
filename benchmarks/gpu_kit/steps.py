"""The steps of the run, in the order of what they are worth, each with its time limit and what is tried when it fails.

A step is one or more commands of `work`, tried in turn until one succeeds; what is in that attempt's `env` then holds for
the steps after it. `needs` names steps without which it is pointless. Knows Python alone.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

WORK = "vega_edge.benchmarks.gpu_kit.work"
FOREGROUND = ("main", "exports")


@dataclass(frozen=True)
class Attempt:
    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """`limit`: seconds of each attempt. `group`: names it on the command line together with others. `run` without names
    runs those of `FOREGROUND`; every other group has to be named in one of `calls.calls`."""

    name: str
    limit: int
    attempts: tuple[Attempt, ...]
    needs: tuple[str, ...] = ()
    group: str = "main"


def all_steps(small: bool = False) -> tuple[Step, ...]:
    """small: the embedded models at their size, beside diffusers as it is, to rehearse on a CPU."""
    vegart, small_sd = ("demo-vegart", "demo-small-sd") if small else ("segmind-vegart", "small-sd")
    large, middle = ("128", "64") if small else ("1024", "512")
    compiled = "eager" if small else "compiled"  # a CPU compiles for minutes
    session, with_vegart, with_small = ("session",), ("session", "export-vegart"), ("session", "export-small-sd")

    def beside(
        model: str, size: str, steps: int, peer: str, batch: int = 1, mode: str = "reduce-overhead"
    ) -> tuple[Attempt, ...]:
        """Ours beside a peer; where that fails, ours alone."""
        common = f"beside {model} --size {size} --steps {steps} --batches {batch} --compile-mode {mode}".split()
        return _work(*common, "--peers", peer), _work(*common, "--peers")

    return (
        Step("imports", 100, (_work("imports"), _work("imports", "--apart"))),
        # where the libraries of the nvidia-* packages are not found by the engine itself
        Step("session", 45, (_work("session"), _work("session", env={"LD_LIBRARY_PATH": _nvidia_libraries()}))),
        Step("miniature", 150, (*_exports("demo-vegart"), _work("embedded"))),
        Step("tests", 200, (_work("tests"),), session),
        Step("export-vegart", 200, _exports(vegart), group="exports"),
        Step("export-small-sd", 150, _exports(small_sd), group="exports"),
        Step("vegart-1024", 90, beside(vegart, large, 4, "eager"), with_vegart),
        Step("small-sd-512", 90, beside(small_sd, middle, 25, "eager"), with_small),
        Step("vegart-512", 90, beside(vegart, middle, 4, "eager"), with_vegart),
        Step("vegart-1024-compiled", 180, beside(vegart, large, 4, compiled)[:1], with_vegart),
        Step("small-sd-512-compiled", 180, beside(small_sd, middle, 25, compiled)[:1], with_small),
        Step("forms", 90, (_work("forms", vegart, large), _work("forms", "demo-vegart", "128")), session),
        Step("profile", 90, (_work("profile", vegart, large), _work("profile", "demo-vegart", "128")), session),
        Step("vegart-1024-batch-4", 90, beside(vegart, large, 4, "eager", 4), with_vegart),
        Step("small-sd-512-batch-4", 90, beside(small_sd, middle, 25, "eager", 4), with_small),
        Step("vegart-512-compiled", 150, beside(vegart, middle, 4, compiled)[:1], with_vegart),
        Step("vegart-512-batch-4", 90, beside(vegart, middle, 4, "eager", 4), with_vegart),
        Step("first-picture", 90, (_work("first", vegart),), with_vegart),
        Step("forms-small-sd", 60, (_work("forms", small_sd, middle),), with_small),
        Step("vegart-1024-batch-4-compiled", 180, beside(vegart, large, 4, compiled, 4)[:1], with_vegart),
        Step("small-sd-512-batch-4-compiled", 180, beside(small_sd, middle, 25, compiled, 4)[:1], with_small),
        Step("vegart-512-batch-4-compiled", 180, beside(vegart, middle, 4, compiled, 4)[:1], with_vegart),
        Step("max-autotune", 400, beside(vegart, large, 4, compiled, 1, "max-autotune")[:1], with_vegart),
        # in the background of the uploads: kernels of the compiled peers, kept in torch's caches
        Step("warm-vegart-1024", 200, (_work("warm", vegart, large),), group="warm"),
        Step("warm-small-sd-512", 200, (_work("warm", small_sd, middle),), group="warm"),
        Step("warm-vegart-512", 200, (_work("warm", vegart, middle),), group="warm"),
        Step("tensorrt-rtx", 180, (_work("rtx"),), group="rtx"),
    )  # fmt: skip


def chosen(words: list[str], steps: tuple[Step, ...]) -> list[Step]:
    """Return the steps, in their own order, that `words` name or whose group they name; without words, those that run
    in the foreground."""
    known = {step.name for step in steps} | {step.group for step in steps}
    if unknown := [word for word in words if word not in known]:
        raise SystemExit(f"there is no step {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    if not words:
        return [step for step in steps if step.group in FOREGROUND]
    return [step for step in steps if step.name in words or step.group in words]


def _work(*words: str, env: Mapping[str, str] | None = None) -> Attempt:
    return Attempt(("-m", WORK, *words), env or {})


def _exports(model: str) -> tuple[Attempt, ...]:
    """The second, where the machine shows less memory than it gives."""
    return _work("export", model), _work("export", model, "--any-memory")


def _nvidia_libraries() -> str:
    """A search path: the nvidia packages' libraries, those of an installed toolkit and driver, and what it was before."""
    places = [*site.getsitepackages(), *sys.path]
    folders = [folder for place in dict.fromkeys(places) for folder in sorted(Path(place).glob("nvidia/*/lib"))]
    usual = [Path(folder) for folder in ("/usr/local/cuda/lib64", "/usr/local/nvidia/lib64") if Path(folder).is_dir()]
    before = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return ":".join([*map(str, folders + usual), *before])
