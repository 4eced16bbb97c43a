"""AUTOMATIC1111's DDIM, PLMS, UniPC and Restart against transcriptions from the papers, in float64.

These work on variance-preserving x, with alphas and timesteps, as the papers write them; the samplers' own form is
another, and so is UniPC's way to its weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vega_edge.runtime.schedulers import get_scheduler

from . import fakes
from .sampler_cells import PREDICTIONS, noise_for, relative

STEPS = (2, 3, 4, 5, 10, 25, 36, 61, 100)
Array = np.ndarray
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype(np.float32).astype(np.float64)


def epsilon(x: Array, t: float, abar: float, prediction: str) -> Array:
    """The network's noise: Salimans & Ho 2022 (arXiv:2202.00512), appendix D, for v."""
    out = fakes.network(x, t)
    if prediction == "v_prediction":
        return np.sqrt(abar) * out + np.sqrt(1 - abar) * x
    return out if prediction == "epsilon" else (x - np.sqrt(abar) * out) / np.sqrt(1 - abar)


def timesteps(steps: int) -> list[int]:
    """Rising, of which the last is where the walk begins and the first where it ends."""
    return [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)]


def transfer(x: Array, e: Array, a: float, a_next: float, sigma: float = 0.0, z: Array | float = 0.0) -> Array:
    """Equation 12 of Song et al. 2020 (arXiv:2010.02502)."""
    x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
    return np.sqrt(a_next) * x0 + np.sqrt(1 - a_next - sigma**2) * e + sigma * z


def ddim(noise: list[Array], steps: int, prediction: str, eta: float) -> Array:
    draws = iter(noise)
    x = next(draws)
    for t, t_next in itertools.pairwise(timesteps(steps)[::-1]):
        a, a_next = ABAR[t], ABAR[t_next]
        sigma = eta * np.sqrt((1 - a_next) / (1 - a)) * np.sqrt(1 - a / a_next)  # its equation 16
        x = transfer(x, epsilon(x, t, a, prediction), a, a_next, sigma, next(draws) if eta else 0.0)
    return x


def plms(noise: list[Array], steps: int, prediction: str) -> Array:
    """Equations 12 and 13 of Liu et al. 2022 (arXiv:2202.09778), begun as Stable Diffusion's sampler begins it."""
    x, e = noise[0], []
    for t, t_next in itertools.pairwise(timesteps(steps)[::-1]):
        a, a_next = ABAR[t], ABAR[t_next]
        e.append(epsilon(x, t, a, prediction))
        if len(e) == 1:
            mean = (e[0] + epsilon(transfer(x, e[0], a, a_next), t_next, a_next, prediction)) / 2
        elif len(e) == 2:
            mean = (3 * e[-1] - e[-2]) / 2
        elif len(e) == 3:
            mean = (23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / 12
        else:
            mean = (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4]) / 24
        x = transfer(x, mean, a, a_next)
    return x


def lagrange_weights(h: float, nodes: list[float]) -> list[float]:
    """Of each node's polynomial p: the integral over 0..h of exp(tau - h) p(tau), by quadrature."""
    at, weight = np.polynomial.legendre.leggauss(40)
    tau, weight = (at + 1) * h / 2, weight * h / 2
    return [
        float((weight * np.exp(tau - h) * np.prod([(tau - n) / (m - n) for n in nodes if n != m], axis=0)).sum())
        for m in nodes
    ]


def unipc(noise: list[Array], steps: int, prediction: str, order: int = 3) -> Array:
    """Zhao et al. 2023 (arXiv:2302.04867): the exponential integral of the data prediction's interpolation.

    Solving the paper's system for all of its unknowns is that very interpolation, whatever B(h); it differs only
    where one unknown is left, which is then 1/2, with B1(h) = h.
    """
    count = len(timesteps(steps))
    index = np.linspace(999, 0, count + 1)
    log_alpha = np.interp(index, np.arange(1000), 0.5 * np.log(ABAR))
    alpha = np.exp(log_alpha)
    sigma = np.sqrt(1 - alpha**2)
    lam = log_alpha - np.log(sigma)

    def data(x: Array, i: int) -> Array:
        return (x - sigma[i] * epsilon(x, index[i], alpha[i] ** 2, prediction)) / alpha[i]

    def step(x: Array, i: int, others: list[tuple[float, Array]]) -> Array:
        """From i to i + 1 with x0 at i and `others`, which are at given lambdas."""
        h, first = lam[i + 1] - lam[i], said[i]
        out = sigma[i + 1] / sigma[i] * x
        if len(others) == 1:
            ((where, m),) = others
            slope = (m - first) / ((where - lam[i]) / h)
            return out + alpha[i + 1] * ((1 - np.exp(-h)) * first + h * slope / 2)
        known = [(0.0, first), *((where - lam[i], m) for where, m in others)]
        weights = lagrange_weights(h, [where for where, _ in known])
        return out + alpha[i + 1] * sum(w * m for w, (_, m) in zip(weights, known, strict=True))

    x, said = noise[0], {}
    said[0] = data(x, 0)
    for i in range(count):
        p = min(order, i + 1, count - i)
        older = [(lam[i - k], said[i - k]) for k in range(1, p)]
        guess = step(x, i, older)
        if i == count - 1:
            return guess
        said[i + 1] = data(guess, i + 1)
        x = step(x, i, [*older, (lam[i + 1], said[i + 1])])
    raise AssertionError


def karras(n: int, low: float, high: float) -> Array:
    i = np.arange(n) / max(n - 1, 1)
    return (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def restart_walk(steps: int) -> list[tuple[float, float]]:
    """The intervals: algorithm 1 of Xu et al. 2023 (arXiv:2306.14878), set as the web UI sets it: from 20 steps on,
    between its levels nearest 0.1 and 2.
    """
    spent, times = (steps // 4, 2) if steps >= 36 else (9, 1) if steps >= 20 else (0, 0)
    train = np.sqrt(1 / ABAR - 1)
    levels = karras(steps - spent * times, train[0], train[-1])
    walk, bottom = [], int(np.argmin(abs(levels - 0.1)))
    for i, pair in enumerate(itertools.pairwise([*levels, 0.0])):
        walk.append(pair)
        if times and i + 1 == bottom:
            top = levels[int(np.argmin(abs(levels - 2.0)))]
            again = [*karras(spent + 1, levels[bottom], top)[:-1], levels[bottom]]
            walk += list(itertools.pairwise(again)) * times
    return walk


def restart(noise: list[Array], steps: int, prediction: str) -> Array:
    train = np.sqrt(1 / ABAR - 1)

    def slope(x: Array, sigma: float) -> Array:
        t = float(np.interp(np.log(sigma), np.log(train), np.arange(1000)))
        return epsilon(x / np.sqrt(1 + sigma**2), t, 1 / (1 + sigma**2), prediction)

    draws, walk = iter(noise), restart_walk(steps)
    x, at = next(draws) * walk[0][0], walk[0][0]
    for sigma, sigma_next in walk:
        if sigma > at:
            x = x + next(draws) * np.sqrt(sigma**2 - at**2)
        d = slope(x, sigma)
        if sigma_next > 0:
            d = (d + slope(x + (sigma_next - sigma) * d, sigma_next)) / 2
        x, at = x + (sigma_next - sigma) * d, sigma_next
    return x


def compare(name: str, transcription: Callable[..., Array], steps: int, prediction: str, **options: Any) -> None:
    row = get_scheduler(name, "a1111")
    noise = noise_for(steps)
    got = fakes.walk(
        row.with_eta(options["eta"]) if options else row, {**fakes.VEGA, "prediction_type": prediction}, steps, noise
    )
    expected = transcription([n.astype(np.float64) for n in noise], steps, prediction, **options)
    assert relative(got.latents, expected) < 1e-4  # both variance-preserving, or, Restart's, at zero


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_same_latents_as_the_papers(prediction: str, steps: int) -> None:
    compare("DDIM", ddim, steps, prediction, eta=0.0)
    compare("DDIM", ddim, steps, prediction, eta=0.5)
    compare("DDIM", ddim, steps, prediction, eta=1.0)
    compare("PLMS", plms, steps, prediction)
    compare("Restart", restart, steps, prediction)
    if steps >= 3:
        compare("UniPC", unipc, steps, prediction)


@pytest.mark.parametrize(("steps", "times"), [(19, 0), (20, 1), (35, 1), (36, 2)])
def test_restart_walks_back_up(steps: int, times: int) -> None:
    row = get_scheduler("Restart", "a1111")
    schedule = row.schedule(row.noise_model(fakes.VEGA), steps)
    walk = restart_walk(steps)
    ups = [i for i, (a, b) in enumerate(itertools.pairwise(walk)) if b[0] > a[1]]
    assert len(schedule.detours) == len(ups) == times
    for i, detour in zip(ups, schedule.detours, strict=True):
        again = walk[i + 1 : i + len(detour)]
        assert detour == pytest.approx(np.array([again[0][0], *(low for _, low in again)]), rel=1e-6)
    x = np.ones((1, 1, 1, 1), np.float32)
    done = list(row.sampler(lambda x, sigma: 0 * x, x, schedule, lambda a, b: 0 * x))
    assert [step.sigma for step in done] == pytest.approx([low for _, low in walk], rel=1e-6)
