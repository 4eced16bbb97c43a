"""Time outside the engine of one step at 1×4×128×128 float32: every sampler against diffusers' scheduler of that name.

    python -m vega_edge.bench.samplers -o benchmarks/results/samplers.json

The network is a stub that answers at once. Ours: the sampler, the denoiser's scaling and the noise as a pipeline draws
it, but in turn, not while an engine runs. Theirs: `scale_model_input` and `step` with a generator; for samplers whose
noise is a Brownian path's, with torchsde's tree. Making the tree counts on both sides. Both take turns; medians of
walks, over their steps. Exit status 1 where a goal is missed: at most half of diffusers' time and 1 ms for samplers that
draw nothing, 1.3 times for the others.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engines import Spec
from ..runtime.denoiser import Denoiser
from ..runtime.rng import NoiseSource
from ..runtime.schedulers import Scheduler, all_schedulers
from .machine import facts, markdown

SHAPE, STEPS = (4, 128, 128), 25
MOST_OF_THEIRS, MOST_MS = 0.5, 1.0  # of a sampler that draws nothing
MOST_OF_THEIRS_DRAWING = 1.3  # the exact draw included
CONFIG = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
_SDE = {"algorithm_type": "sde-dpmsolver++"}
# diffusers' classes and options for the web UI's names, by its documentation's table; where there are none, none.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscrete", {}), "Euler a": ("EulerAncestralDiscrete", {}), "LMS": ("LMSDiscrete", {}),
    "Heun": ("HeunDiscrete", {}), "DPM2": ("KDPM2Discrete", {}), "DPM2 a": ("KDPM2AncestralDiscrete", {}),
    "DPM++ 2M": ("DPMSolverMultistep", {}),
    "DPM++ SDE": ("DPMSolverSDE", {}), "DPM++ 2M SDE": ("DPMSolverMultistep", _SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistep", {**_SDE, "solver_type": "heun"}),
    "DPM++ 3M SDE": ("DPMSolverMultistep", {**_SDE, "solver_order": 3}),
    "DDIM": ("DDIM", {}), "PLMS": ("PNDM", {}), "UniPC": ("UniPCMultistep", {"solver_order": 3, "solver_type": "bh1"}),
}  # fmt: skip


class Stub:
    """An engine that answers at once, with the same values whatever it is asked."""

    def __init__(self) -> None:
        self.inputs = {"sample": Spec(np.dtype(np.float32), (None,) * 4), "timestep": Spec(np.dtype(np.float32), (1,))}
        self.outputs = {"out_sample": Spec(np.dtype(np.float32), (None,) * 4)}
        self._out = np.random.default_rng(0).standard_normal((1, *SHAPE), dtype=np.float32)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"out_sample": self._out}

    def close(self) -> None:
        pass


def ours(row: Scheduler) -> Callable[[], float]:
    """Seconds a step, when called."""
    model = row.noise_model(CONFIG)
    schedule = row.schedule(model, STEPS)
    denoise = Denoiser(Stub(), schedule, {}, 0.0, "epsilon")

    def walk() -> float:
        source = NoiseSource([1])
        x = source(SHAPE) * np.float32(schedule.scale)
        start = time.perf_counter()
        tree = source.brownian(SHAPE, *schedule.levels_span) if row.brownian else None
        noise = tree or (lambda sigma, sigma_next: source(SHAPE))
        count = sum(1 for _ in row.sampler(denoise, x, schedule, noise))
        return (time.perf_counter() - start) / count

    return walk


def theirs(row: Scheduler) -> Callable[[], float] | None:
    import diffusers
    import torch

    spacing = next((s for s in ("Karras", "Exponential") if row.name.endswith(s)), "")
    if row.diffusers:
        name, options = row.diffusers, dict(row.forced)
    else:
        plain = row.name.removesuffix(spacing).strip()
        if plain not in PEERS:
            return None
        name, options = f"{PEERS[plain][0]}Scheduler", dict(PEERS[plain][1])
        options.update({f"use_{spacing.lower()}_sigmas": True} if spacing else {})
    diffusers.utils.logging.set_verbosity_error()
    scheduler = getattr(diffusers, name).from_config(CONFIG, **options)
    out = torch.from_numpy(Stub()._out)
    takes = inspect.signature(scheduler.step).parameters

    def walk() -> float:
        generator = torch.Generator().manual_seed(1)
        scheduler.set_timesteps(STEPS)
        step = scheduler.step
        if "generator" in takes:
            step = functools.partial(step, generator=generator)
        x = torch.randn((1, *SHAPE), generator=generator) * scheduler.init_noise_sigma
        start = time.perf_counter()
        extra = _tree_of_theirs(scheduler) if row.brownian and "variance_noise" in takes else lambda i: {}
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                scheduler.scale_model_input(x, t)
                x = step(out, t, x, **extra(i)).prev_sample
        return (time.perf_counter() - start) / STEPS

    return walk


def _tree_of_theirs(scheduler: Any) -> Callable[[int], dict[str, Any]]:
    """diffusers' wrapper of torchsde's tree, for a scheduler that would else draw independent noise."""
    import torch
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    x, sigmas = torch.zeros((1, *SHAPE)), scheduler.sigmas
    tree = BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=[1])
    return lambda i: {"variance_noise": tree(sigmas[i], sigmas[i + 1]) if sigmas[i + 1] > 0 else x}


def measure(runs: int) -> Iterator[dict[str, Any]]:
    for row in all_schedulers():
        mine, other = ours(row), theirs(row)
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for i in range(runs + 1):
            for key, walk in (("ours", mine), ("theirs", other)):
                if walk:
                    seconds = walk()
                    if i:  # the first warms up
                        taken[key].append(seconds)
        ms = {key: statistics.median(values) * 1000 for key, values in taken.items() if values}
        yield {
            "family": row.family, "name": row.name, "stochastic": row.stochastic, "ms": ms["ours"],
            "diffusers_ms": ms.get("theirs"), "ratio": ms["ours"] / ms["theirs"] if "theirs" in ms else None,
        }  # fmt: skip


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """Which goals are missed, by which sampler."""
    missed = []
    for r in rows:
        most = MOST_OF_THEIRS_DRAWING if r["stochastic"] else MOST_OF_THEIRS
        if r["ratio"] is not None and r["ratio"] > most:
            missed.append(f"{r['name']} ({r['family']}): {r['ratio']:.2f} of diffusers' time, goal {most:g}")
        if not r["stochastic"] and r["ms"] >= MOST_MS:
            missed.append(f"{r['name']} ({r['family']}): {r['ms']:.2f} ms a step, goal below {MOST_MS:g}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy's quadrature in diffusers' LMS
        rows = list(measure(arguments.runs))
    print(
        markdown(
            ["family", "scheduler", "draws noise", "a step", "diffusers", "share of its time"],
            [
                (
                    r["family"], r["name"], "yes" if r["stochastic"] else "", f"{r['ms']:.2f} ms",
                    f"{r['diffusers_ms']:.2f} ms" if r["ratio"] else "", f"{r['ratio']:.2f}" if r["ratio"] else "",
                )
                for r in rows
            ],
        )
    )  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps({**facts(), "steps": STEPS, "rows": rows}, indent=1) + "\n")
    if missed := shortfalls(rows):
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
