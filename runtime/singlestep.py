"""Samplers of second and third order that need no past: they look inside the interval. See `samplers.py` for the terms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .samplers import Array, Denoise, Noise, Step, add, add_terms, split, toward
from .schedules import Schedule

# DPM adaptive's tolerances, and its first try's width in log sigma: rtol, atol and h_init of k-diffusion's
# `sample_dpm_adaptive`, by default.
_RELATIVE, _ABSOLUTE, _FIRST_WIDTH = 0.05, 0.0078, 0.05
_MOST_REFUSED = 100  # of DPM adaptive's tries of one step, each narrower: nothing is yielded meanwhile


def dpmpp_2s(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2S), Lu et al. 2022 (arXiv:2211.01095, algorithm 1), r 1/2; k-diffusion's ancestral with eta 1."""
    scratch = np.empty_like(x)
    for sigma, sigma_next in schedule.intervals():
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        if down == 0:
            x = toward(x, x0, 0.0)
        else:
            middle = math.sqrt(sigma * down)
            x = toward(x, denoise(toward(x, x0, middle / sigma), middle), down / sigma)
        if up > 0:
            add(x, up, noise(sigma, sigma_next), scratch)
        yield Step(x, x0, sigma_next)


def dpm_single(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++ in single steps (Lu et al. 2022, arXiv:2211.01095, after DPM-Solver, arXiv:2206.00927) over runs of
    the schedule's own steps, as diffusers' DPMSolverSinglestep walks it: of orders 1, 2, (3), each from where the run
    began, looking at what the network said there and last.
    """
    assert schedule.orders is not None
    scratch = np.empty_like(x)
    run: list[tuple[Array, float]] = []
    started = x
    for (sigma, sigma_next), order in zip(schedule.intervals(), schedule.orders, strict=True):
        x0 = denoise(x, sigma)
        run = [(x0, sigma), *run][:order]
        if order == 1:
            started = x
        first, top = run[-1]
        ratio = sigma_next / top
        x = toward(started, first, ratio)
        if order > 1 and sigma_next > 0:
            h = -math.log(ratio)
            rise = (1 - ratio) / 2 if order == 2 else 1 - (1 - ratio) / h
            weight = rise * h / math.log(top / sigma)
            add_terms(x, (weight, -weight), (x0, first), scratch)
        yield Step(x, x0, sigma_next)


class _Call(NamedTuple):
    """What the network said at one place; several steps may start there."""

    x: Array
    sigma: float
    x0: Array
    eps: Array


def _call(denoise: Denoise, x: Array, sigma: float) -> _Call:
    x0 = denoise(x, sigma)
    return _Call(x, sigma, x0, (x - x0) * (1 / sigma))


def _solve_1(at: _Call, sigma_next: float) -> Array:
    return toward(at.x, at.x0, sigma_next / at.sigma)


def _inner(at: _Call, sigma_next: float, share: float) -> float:
    """The sigma at `share` of the way in log sigma."""
    return at.sigma * math.pow(sigma_next / at.sigma, share)


def _solve_2(denoise: Denoise, at: _Call, sigma_next: float, share: float) -> tuple[Array, _Call]:
    """DPM-Solver-2 (arXiv:2206.00927, algorithm 4, any r1), and its inner call."""
    middle = _inner(at, sigma_next, share)
    inner = _call(denoise, at.x + at.eps * (middle - at.sigma), middle)
    out = at.x + at.eps * (sigma_next - at.sigma)
    out += (inner.eps - at.eps) * ((sigma_next - at.sigma) / (2 * share))
    return out, inner


def _solve_3(denoise: Denoise, at: _Call, sigma_next: float, inner: _Call | None = None) -> Array:
    """DPM-Solver-3 (arXiv:2206.00927, algorithm 5), r1 1/3 and r2 2/3; `inner` is the call at r1 if there was one."""
    if inner is None:
        level = _inner(at, sigma_next, 1 / 3)
        inner = _call(denoise, at.x + at.eps * (level - at.sigma), level)
    later = _inner(at, sigma_next, 2 / 3)
    guess = at.x + at.eps * (later - at.sigma)
    guess += (inner.eps - at.eps) * (-2 * later * _phi(math.log(at.sigma / later)))
    last = _call(denoise, guess, later)
    out = at.x + at.eps * (sigma_next - at.sigma)
    out += (last.eps - at.eps) * (-1.5 * sigma_next * _phi(math.log(at.sigma / sigma_next)))
    return out


def _phi(h: float) -> float:
    return math.expm1(h) / h - 1


def dpm_fast(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, appendix D.4): the schedule's orders, mostly 3."""
    assert schedule.orders is not None
    least = float(schedule.sigmas[-1])
    for (sigma, sigma_next), order in zip(schedule.intervals(), schedule.orders, strict=True):
        down, up = _split_above(sigma, sigma_next, eta, least)
        at = _call(denoise, x, sigma)
        if order == 1:
            x = _solve_1(at, down)
        elif order == 2:
            x, _ = _solve_2(denoise, at, down, 1 / 2)
        else:
            x = _solve_3(denoise, at, down)
        if up > 0:
            x += noise(sigma, sigma_next) * up
        yield Step(x, at.x0, sigma_next)


def _split_above(sigma: float, sigma_next: float, eta: float, least: float) -> tuple[float, float]:
    """`split`, but not down below `least`; the noise makes up for just what is left."""
    down = max(split(sigma, sigma_next, eta)[0], least)
    return down, math.sqrt(max(sigma_next**2 - down**2, 0.0))


def dpm_adaptive(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver-23 (Lu et al. 2022, arXiv:2206.00927, appendix C): steps as wide in log sigma as the difference
    between second and third order allows.

    The width follows k-diffusion's controller: 1 / error to the power 1 / order (1 / 1.5 with eta), through
    1 + atan(. - 1); a step whose factor is below 0.81 is taken again, narrower. Only accepted steps are yielded.
    """
    sigma, least = (float(s) for s in schedule.sigmas[[0, -1]])
    h, power = _FIRST_WIDTH, 1 / (1.5 if eta else 3)
    before, refused = x, 0
    while math.log(sigma / least) > 1e-5:
        sigma_next = max(sigma * math.exp(-h), least)
        down, up = _split_above(sigma, sigma_next, eta, least)
        at = _call(denoise, x, sigma)
        low, inner = _solve_2(denoise, at, down, 1 / 3)
        high = _solve_3(denoise, at, down, inner)
        allowed = np.maximum(_ABSOLUTE, _RELATIVE * np.maximum(np.abs(low), np.abs(before)))
        error = float(np.sqrt(np.mean(np.square((low - high) / allowed))))
        factor = 1 + math.atan((1 / (error + 1e-8)) ** power - 1)
        h *= factor
        refused += 1
        if refused > _MOST_REFUSED:
            raise UsageError(f"DPM adaptive finds no step that is right at sigma {sigma:.4g}; take another scheduler")
        if factor >= 0.81:
            refused = 0
            before, x, start, sigma = low, high, sigma, sigma_next
            if up > 0:
                x = x + noise(start, sigma_next) * up
            yield Step(x, at.x0, sigma_next)
