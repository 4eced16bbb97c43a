"""Samplers: generators that walk from noise to a picture. No state but their locals, no torch, no backend.

`denoise(x, sigma)` gives the network's estimate of x0; x is in sigma units, x = x0 + sigma * noise.
`noise(sigma, sigma_next)` gives normal deviates of x's shape: independent ones whatever the two are, or a Brownian
path's between them. Each step yields a `Step`; the last one's `x` is the result. Arrays that were yielded, or given,
are not written to again; those that only `denoise` saw may be. Here: samplers that look at one interval at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .schedules import Schedule

Array = NDArray[np.float32]
Denoise = Callable[[Array, float], Array]
Noise = Callable[[float, float], Array]
Sampler = Callable[[Denoise, Array, Schedule, Noise], Iterator["Step"]]


class Step(NamedTuple):
    """x after the step, the estimate of x0 it was made with, and the sigma that x has now."""

    x: Array
    x0: Array
    sigma: float


def toward(x: Array, x0: Array, ratio: float) -> Array:
    """x0 + (x - x0) * ratio: what is left of x's noise when its sigma goes down by `ratio`."""
    out = x - x0
    out *= ratio
    out += x0
    return out


def add(out: Array, factor: float, a: Array, scratch: Array) -> None:
    """out += factor * a, by way of `scratch`."""
    np.multiply(a, factor, out=scratch)
    out += scratch


def add_terms(out: Array, factors: Sequence[float], arrays: Sequence[Array], scratch: Array) -> None:
    """out += factor * a for each pair of them, in order: what higher orders add to a first-order step."""
    for factor, a in zip(factors, arrays, strict=True):
        add(out, factor, a, scratch)


def split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """The sigma to step down to and the noise to add there for arriving at sigma_next; eta 0 adds none.

    Equation 16 of Song et al. 2020 (arXiv:2010.02502) in sigma units; k-diffusion's `get_ancestral_step`.
    """
    up = eta * sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


def euler(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364) without churn or its second-order correction."""
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        x = toward(x, x0, sigma_next / sigma)
        yield Step(x, x0, sigma_next)


def ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """Euler to a lower sigma than asked, then noise up to it again.

    With eta 1 it is k-diffusion's `sample_euler_ancestral` and, in sigma units, DDPM's posterior of fixed small
    variance (Ho et al. 2020, arXiv:2006.11239, equation 7); with eta between, DDIM (Song et al. 2020,
    arXiv:2010.02502, equation 12). A step lands on `schedule.landings`; where the grid goes on from another sigma, x
    is read there as the network reads it: its variance-preserving form x / sqrt(1 + sigma^2) is kept.
    """
    scratch = np.empty_like(x)
    landings = schedule.sigmas[1:] if schedule.landings is None else schedule.landings
    for (sigma, sigma_next), landing in zip(schedule.intervals(), landings.tolist(), strict=True):
        x0 = denoise(x, sigma)
        down, up = split(sigma, landing, eta)
        x = toward(x, x0, down / sigma)
        if up > 0:
            add(x, up, noise(sigma, landing), scratch)
        if landing != sigma_next:
            x *= math.sqrt((1 + sigma_next**2) / (1 + landing**2))
        yield Step(x, x0, sigma_next)


def heun(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364): the slope is the mean of those at both ends."""
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x, x0 = _heun_step(denoise, x, sigma, sigma_next, scratch)
        yield Step(x, x0, sigma_next)


def _heun_step(denoise: Denoise, x: Array, sigma: float, sigma_next: float, scratch: Array) -> tuple[Array, Array]:
    x0 = denoise(x, sigma)
    if sigma_next == 0:
        return toward(x, x0, 0.0), x0
    out = x - x0
    guess = np.multiply(out, sigma_next / sigma, out=scratch)
    guess += x0
    guess -= denoise(guess, sigma_next)
    half = (sigma_next - sigma) / 2
    guess *= half / sigma_next
    out *= half / sigma
    out += x
    out += guess
    return out, x0


def dpm2(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927): the slope is that at the middle in log sigma.

    k-diffusion's `sample_dpm_2`, and with eta 1 its `sample_dpm_2_ancestral`.
    """
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        if down == 0:
            x = toward(x, x0, 0.0)
        else:
            # With eta 1 this is sigma_next up to rounding, where diffusers' grid may have a whole timestep but its middle
            # a fractional one: just beside it.
            middle = math.sqrt(sigma * down) * (1 - 1e-12)
            out = toward(x, x0, middle / sigma)
            out -= denoise(out, middle)
            out *= (down - sigma) / middle
            out += x
            x = out
        if up > 0:
            add(x, up, noise(sigma, sigma_next), scratch)
        yield Step(x, x0, sigma_next)


def restart(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Algorithm 1 of Xu et al. 2023 (arXiv:2306.14878) over Heun's steps: on reaching the end of a detour, noise is
    added up to its start and it is walked down again.
    """
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x, x0 = _heun_step(denoise, x, sigma, sigma_next, scratch)
        yield Step(x, x0, sigma_next)
        for detour in schedule.detours:
            if detour[-1] != sigma_next:
                continue
            high, *lower = detour.tolist()
            x = x + noise(sigma_next, high) * math.sqrt(high**2 - sigma_next**2)
            for level in lower:
                x, x0 = _heun_step(denoise, x, high, level, scratch)
                high = level
                yield Step(x, x0, level)


def lcm(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling, algorithm 3 of Luo et al. 2023 (arXiv:2310.04378): to x0, and noise again."""
    scratch = np.empty_like(x)
    for (sigma, sigma_next), t in zip(schedule.intervals(), schedule.timesteps.tolist(), strict=True):
        # The boundary condition's c_skip and c_out, sigma_data 0.5, timestep_scaling 10; x in its network's form.
        skip = 0.25 / ((10 * t) ** 2 + 0.25)
        out = 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        x0 = denoise(x, sigma) * out
        add(x0, skip / math.hypot(1, sigma), x, scratch)
        x = x0
        if sigma_next > 0:
            x = noise(sigma, sigma_next) * sigma_next
            x += x0
        yield Step(x, x0, sigma_next)


def tcd(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 0.3) -> Iterator[Step]:
    """Strategic stochastic sampling, algorithm 4 of Zheng et al. 2024 (arXiv:2402.19159): to a timestep below the
    next one, by the share eta, and noise up to that.
    """
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        down = 0.0
        if sigma_next > 0:
            down = float(schedule.train_sigmas[int((1 - eta) * schedule.timestep(sigma_next))])
        x = toward(x, x0, down / sigma)
        if down < sigma_next:
            add(x, math.sqrt(sigma_next**2 - down**2), noise(sigma, sigma_next), scratch)
        yield Step(x, x0, sigma_next)
