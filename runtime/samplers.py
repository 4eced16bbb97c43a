"""Samplers: generators that walk from noise to a picture. No state but their locals, no torch, no backend.

`denoise(x, sigma)` gives the network's estimate of x0; x is in sigma units, x = x0 + sigma * noise. `noise()` gives
fresh normal deviates of x's shape. Each step yields a `Step`; the last one's `x` is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .schedules import Schedule

Array = NDArray[np.float32]
Denoise = Callable[[Array, float], Array]
Noise = Callable[[], Array]
Sampler = Callable[[Denoise, Array, Schedule, Noise], Iterator["Step"]]


class Step(NamedTuple):
    """x after the step, the estimate of x0 it was made with, and the sigma that x has now."""

    x: Array
    x0: Array
    sigma: float


def euler(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) without churn or its second-order correction."""
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        x = x0 + (x - x0) * np.float32(sigma_next / sigma)
        yield Step(x, x0, sigma_next)


def euler_ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Euler to a lower sigma than asked, then noise up to it again (k-diffusion's `sample_euler_ancestral`, eta 1)."""
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        x = x0 + (x - x0) * np.float32(down / sigma) + noise() * np.float32(up)
        yield Step(x, x0, sigma_next)


def ddim(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Equation 12 of Song et al. 2020 (arXiv:2010.02502) with eta 0, which in sigma units is Euler's step.

    A step lands on `schedule.landings`; where the grid goes on from another sigma, x is read there as the network
    would read it: its variance-preserving form x / sqrt(1 + sigma^2) is kept.
    """
    landings = schedule.sigmas[1:] if schedule.landings is None else schedule.landings
    for (sigma, sigma_next), landing in zip(schedule.intervals(), landings.tolist(), strict=True):
        x0 = denoise(x, sigma)
        x = x0 + (x - x0) * np.float32(landing / sigma)
        if landing != sigma_next:
            x = x * np.float32(np.sqrt((1 + sigma_next**2) / (1 + landing**2)))
        yield Step(x, x0, sigma_next)


def dpm_multi(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095, algorithm 2); the first and the last step are first order."""
    previous: Array | None = None
    h_last = 0.0
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        d = x0
        if sigma_next > 0:
            h = np.log(sigma / sigma_next)
            if previous is not None and not _is_last_of_few(schedule, sigma_next):
                d = x0 + (x0 - previous) * np.float32(h / (2 * h_last))
            previous, h_last = x0, h
        x = d + (x - d) * np.float32(sigma_next / sigma)
        yield Step(x, x0, sigma_next)


def _is_last_of_few(schedule: Schedule, sigma_next: float) -> bool:
    """Below 15 steps the last one is first order even where it ends above zero (`lower_order_final`)."""
    return len(schedule) < 15 and sigma_next == schedule.sigmas[-1]


def lcm(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling, algorithm 3 of Luo et al. 2023 (arXiv:2310.04378): to x0, and noise again."""
    for (sigma, sigma_next), t in zip(schedule.intervals(), schedule.timesteps.tolist(), strict=True):
        x0 = denoise(x, sigma)
        # The boundary condition's c_skip and c_out, sigma_data 0.5, timestep_scaling 10; x in its network's form.
        skip = 0.25 / ((10 * t) ** 2 + 0.25)
        out = 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        x0 = x0 * np.float32(out) + x * np.float32(skip / np.hypot(1, sigma))
        x = x0 + noise() * np.float32(sigma_next) if sigma_next > 0 else x0
        yield Step(x, x0, sigma_next)
