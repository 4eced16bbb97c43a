"""Samplers of the reverse-time SDE: DPM-Solver++ with noise between steps (Lu et al. 2022, arXiv:2211.01095).

As in k-diffusion's `sample_dpmpp_sde`, `sample_dpmpp_2m_sde` and `sample_dpmpp_3m_sde`, whose noise is a Brownian
path's, so that more steps refine the same path. See `samplers.py` for the terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .multistep import third_order_weights
from .samplers import Array, Denoise, Noise, Step, add, add_terms, split, toward
from .schedules import Schedule


def whole_steps(schedule: Schedule) -> list[tuple[float, float]]:
    """The intervals of the path that the multistep samplers ask for, in order: those that end above zero."""
    return [(a, b) for a, b in schedule.intervals() if b > 0]


def half_and_whole_steps(schedule: Schedule) -> list[tuple[float, float]]:
    """Likewise of `dpmpp_sde`: of each step first the part down to its middle."""
    steps = [_single_logs(a, b) for a, b in whole_steps(schedule)]
    return [pair for a, middle, b in steps for pair in ((a, middle), (a, b))]


def _single_logs(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """sigma, the middle in log sigma, and sigma_next, as k-diffusion's `sample_dpmpp_sde` gets them back from their
    logarithms in float32: up to a bit or two the same, but a Brownian path asked there has other values.
    """
    single = np.float32
    t, t_next = -single(math.log(sigma)), -single(math.log(sigma_next))
    middle = t + (t_next - t) * single(0.5)
    start, between, end = (float(single(math.exp(-float(time)))) for time in (t, middle, t_next))
    return start, between, end


def dpmpp_sde(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++(2S), arXiv:2211.01095, algorithm 1, r 1/2, with the SDE's noise, which is added at the middle too:
    k-diffusion's `sample_dpmpp_sde`.
    """
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = toward(x, x0, 0.0)
        else:
            start, middle, end = _single_logs(sigma, sigma_next)
            down, up = split(start, middle, eta)
            guess = toward(x, x0, down / start)
            if up > 0:
                add(guess, up, noise(start, middle), scratch)
            down, up = split(start, end, eta)
            x = toward(x, denoise(guess, middle), down / start)
            if up > 0:
                add(x, up, noise(start, end), scratch)
        yield Step(x, x0, sigma_next)


def dpmpp_2m_sde(
    denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 1.0, variant: str = "midpoint"
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), arXiv:2211.01095: multistep, second order. The `variant`, midpoint or heun, is how the term
    of second order is approximated: `solver_type` of k-diffusion's `sample_dpmpp_2m_sde`.
    """
    scratch = np.empty_like(x)
    previous: Array | None = None
    last = 0.0
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = toward(x, x0, 0.0)
        else:
            h = math.log(sigma / sigma_next)
            h_eta = (1 + eta) * h
            x = toward(x, x0, math.exp(-h_eta))
            if previous is not None:
                rise = -math.expm1(-h_eta) / 2 if variant == "midpoint" else 1 + math.expm1(-h_eta) / h_eta
                weight = rise * h / last
                add_terms(x, (weight, -weight), (x0, previous), scratch)
            _add_noise(x, sigma, sigma_next, eta, noise, scratch)
            last = h
        previous = x0
        yield Step(x, x0, sigma_next)


def dpmpp_3m_sde(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 1.0) -> Iterator[Step]:
    """The same with the terms of third order, k-diffusion's `sample_dpmpp_3m_sde`: those of arXiv:2211.01095, appendix
    B, over the SDE's step. The second step is `dpmpp_2m_sde`'s heun.
    """
    scratch = np.empty_like(x)
    past: list[Array] = []
    widths: list[float] = []
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = toward(x, x0, 0.0)
        else:
            h = math.log(sigma / sigma_next)
            h_eta = (1 + eta) * h
            x = toward(x, x0, math.exp(-h_eta))
            if len(past) == 1:
                weight = (1 + math.expm1(-h_eta) / h_eta) * h / widths[0]
                add_terms(x, (weight, -weight), (x0, *past), scratch)
            elif len(past) == 2:
                add_terms(x, third_order_weights(h, h_eta, *widths), (x0, *past), scratch)
            _add_noise(x, sigma, sigma_next, eta, noise, scratch)
            widths = [h, *widths[:1]]
        past = [x0, *past[:1]]
        yield Step(x, x0, sigma_next)


def _add_noise(x: Array, sigma: float, sigma_next: float, eta: float, noise: Noise, scratch: Array) -> None:
    """What the SDE's noise of strength eta comes to over a step; exp(-h) is sigma_next / sigma."""
    if eta > 0:
        up = sigma_next * math.sqrt(-math.expm1(-2 * eta * math.log(sigma / sigma_next)))
        add(x, up, noise(sigma, sigma_next), scratch)
