"""Samplers that remember: each step looks back on what the network said before. See `samplers.py` for the terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .samplers import Array, Denoise, Noise, Step, add_terms, toward
from .schedules import Schedule

_ADAMS_BASHFORTH = ((), (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, order: int = 4) -> Iterator[Step]:
    """Linear multistep, k-diffusion's `sample_lms`: Adams-Bashforth, which Liu et al. 2022 (arXiv:2202.09778) brought
    to diffusion, over sigma, whose steps are uneven: the slopes' interpolating polynomial, integrated.

    With levels above the first, it is diffusers' `LMSDiscreteScheduler` from a picture: the polynomial goes through
    those levels too, and the slopes there, which nobody knows, count as zero.
    """
    scratch = np.empty_like(x)
    above = [] if schedule.above is None else schedule.above.tolist()
    levels = [*above, *schedule.sigmas.tolist()]
    past: list[Array] = []  # x - x0, the slopes but for 1 / sigma
    for i, (sigma, sigma_next) in enumerate(schedule.intervals(), len(above)):
        x0 = denoise(x, sigma)
        past = [x - x0, *past[: order - 1]]
        out = x
        weights = _lagrange_integrals(levels, i, min(i + 1, order))
        for j, weight in enumerate(weights[: len(past)]):
            np.multiply(past[j], weight / levels[i - j], out=scratch)
            out = out + scratch if out is x else np.add(out, scratch, out=out)
        x = out
        yield Step(x, x0, sigma_next)


def _lagrange_integrals(levels: Sequence[float], i: int, count: int) -> list[float]:
    """From level i to i + 1, of each of the `count` Lagrange polynomials through levels i, i - 1, ..."""
    start, width = levels[i], levels[i + 1] - levels[i]
    total = [0.0] * count
    for node in (-1 / math.sqrt(3), 1 / math.sqrt(3)):  # two-point Gauss, exact for these cubics
        at = start + width * (node + 1) / 2
        for j in range(count):
            others = (k for k in range(count) if k != j)
            total[j] += math.prod((at - levels[i - k]) / (levels[i - j] - levels[i - k]) for k in others)
    return [t * width / 2 for t in total]


def plms(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """Pseudo linear multistep, Liu et al. 2022 (arXiv:2202.09778): Adams-Bashforth weights on the network's noise,
    DDIM's step with that. The first step is taken twice, the second time with the mean of both ends' noise.

    Where `schedule.velocity`, the weights are on v, as diffusers' PNDM has it. Landings as in `samplers.ancestral`.
    """
    landings = schedule.sigmas[1:] if schedule.landings is None else schedule.landings
    velocity = schedule.velocity
    said = np.zeros((4, *x.shape), x.dtype)  # the last four times, in turn
    factors: list[float] = []
    for i, ((sigma, sigma_next), landing) in enumerate(zip(schedule.intervals(), landings.tolist(), strict=True)):
        x0 = denoise(x, sigma)
        factors.append(_hear(x, x0, sigma, velocity, said[i % 4]))
        weights = [0.0] * 4
        for age, weight in enumerate(_ADAMS_BASHFORTH[min(i + 1, 4)]):
            weights[(i - age) % 4] = weight * factors[i - age]
        if i == 0 and schedule.retake:
            start, end = schedule.retake
            guess = _reread(_go(x, said, weights, sigma, landing, velocity), landing, end)
            second = _hear(guess, denoise(guess, end), end, velocity, said[1])
            x = _go(_reread(x, sigma, start), said, [factors[0] / 2, second / 2, 0, 0], start, end, velocity)
            landing = end
        else:
            x = _go(x, said, weights, sigma, landing, velocity)
        x = _reread(x, landing, sigma_next)
        yield Step(x, x0, sigma_next)


def _hear(x: Array, x0: Array, sigma: float, velocity: bool, out: Array) -> float:
    """Writes the network's noise, (x - x0) / sigma, or its v (Salimans & Ho 2022, arXiv:2202.00512) into `out`, but
    for the factor that is returned.
    """
    if not velocity:
        np.subtract(x, x0, out=out)
        return 1 / sigma
    np.multiply(x, 1 / (1 + sigma**2), out=out)
    out -= x0
    return math.hypot(1, sigma) / sigma


def _go(x: Array, said: Array, weights: Sequence[float], sigma: float, sigma_next: float, velocity: bool) -> Array:
    """DDIM's step along the noise, which for v is made of it and x."""
    reach, keep = sigma_next - sigma, 1.0
    if velocity:
        keep += reach * sigma / (1 + sigma**2)
        reach /= math.hypot(1, sigma)
    combined = np.array([w * reach for w in weights], x.dtype) @ said.reshape(len(said), -1)
    out: Array = combined.reshape(x.shape)
    out += x * keep if velocity else x
    return out


def _reread(x: Array, sigma: float, other: float) -> Array:
    """The x whose variance-preserving form at sigma `other` is that of this x at `sigma`."""
    return x if sigma == other else x * math.sqrt((1 + other**2) / (1 + sigma**2))


def dpm_multi(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++ 2M and 3M, Lu et al. 2022 (arXiv:2211.01095, algorithm 2 and appendix B).

    In sigma units the data's factor alpha is 1, and exp(-h), h the step in -log sigma, is sigma_next / sigma. Orders
    are the schedule's, else 2 from the second step on but 1 for a step to zero (k-diffusion's `sample_dpmpp_2m`).
    """
    scratch = np.empty_like(x)
    past: list[Array] = []
    widths: list[float] = []  # of the steps between `past`, newest first
    for i, (sigma, sigma_next) in enumerate(schedule.intervals()):
        x0 = denoise(x, sigma)
        ratio = sigma_next / sigma
        order = schedule.orders[i] if schedule.orders else min(i + 1, 2)
        if ratio in (0, 1) or order == 1:
            x = toward(x, x0, ratio)
        elif order == 2:
            x = toward(x, _extrapolated(x0, past[0], -math.log(ratio) / (2 * widths[0]), scratch), ratio)
        else:
            h = -math.log(ratio)
            x = toward(x, x0, ratio)
            add_terms(x, third_order_weights(h, h, *widths), (x0, *past), scratch)
        past = [x0, *past[:1]]
        widths = [-math.log(ratio) if ratio > 0 else math.inf, *widths[:1]]
        yield Step(x, x0, sigma_next)


def _extrapolated(x0: Array, previous: Array, weight: float, scratch: Array) -> Array:
    """x0 + (x0 - previous) * weight, in `scratch`."""
    np.subtract(x0, previous, out=scratch)
    scratch *= weight
    scratch += x0
    return scratch


def third_order_weights(h: float, h_eta: float, last: float, older: float) -> tuple[float, float, float]:
    """Of x0, the last and the one before in the terms of DPM-Solver++ 3M beyond the first order.

    h: the step in -log sigma; last, older: the two before it. h_eta is h for the ODE, (1 + eta) h for the SDE.
    """
    r0, r1 = last / h, older / h
    phi_2 = math.expm1(-h_eta) / h_eta + 1
    phi_3 = phi_2 / h_eta - 0.5
    # The differences d0 = (x0 - x1) / r0 and d1 = (x1 - x2) / r1; the first derivative is d0 + (d0 - d1) r0 / (r0 + r1),
    # the second (d0 - d1) / (r0 + r1).
    bend = (phi_2 * r0 - phi_3) / (r0 + r1)
    of_d0, of_d1 = phi_2 + bend, -bend
    return of_d0 / r0, of_d1 / r1 - of_d0 / r0, -of_d1 / r1


class _Said(NamedTuple):
    """What the network said, and at which sigma."""

    sigma: float
    x0: Array


def unipc(denoise: Denoise, x: Array, schedule: Schedule, noise: Noise, variant: str = "bh2") -> Iterator[Step]:
    """UniPC, Zhao et al. 2023 (arXiv:2302.04867, algorithms 5 and 6), data prediction, variants B1 and B2.

    What the network says where a step arrived also corrects that step, from where it started.
    """
    assert schedule.orders is not None
    scratch = np.empty_like(x)
    past: list[_Said] = []
    known: list[_Said] = []  # of them, what the last step was made with
    started = x
    for (sigma, sigma_next), order in zip(schedule.intervals(), schedule.orders, strict=True):
        here = _Said(sigma, denoise(x, sigma))
        if known:
            x = _unipc_step(started, [*known, here], sigma, variant, scratch)
        started, past = x, [here, *past[:2]]
        known = past[:order]
        x = _unipc_step(started, known, sigma_next, variant, scratch)
        yield Step(x, here.x0, sigma_next)


def _unipc_step(x: Array, said: list[_Said], sigma_next: float, variant: str, scratch: Array) -> Array:
    """From where the first of `said` was said. The others stand anywhere; one at sigma_next makes it a corrector."""
    (sigma, x0), *others = said
    out = toward(x, x0, sigma_next / sigma)
    if others:
        h = math.log(sigma / sigma_next)
        weights = _unipc_weights(h, [math.log(sigma / other.sigma) / h for other in others], variant)
        add_terms(out, (-sum(weights), *weights), [x0, *(other.x0 for other in others)], scratch)
    return out


def _unipc_weights(h: float, points: list[float], variant: str) -> list[float]:
    """Of the differences to x0 at the start, at `points`: in steps, negative before it, 1 where it arrives.

    The system R rho = b of the paper's equation 10; a single unknown is 1/2, as its authors take it.
    """
    scale = -h if variant == "bh1" else math.expm1(-h)
    if len(points) == 1:
        rho = [0.5]
    else:
        phi, b, factorial = math.expm1(-h) / -h - 1, [], 1
        for k in range(1, len(points) + 1):
            b.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.array([[p**k for p in points] for k in range(len(points))]), b).tolist()
    return [-scale * r / p for r, p in zip(rho, points, strict=True)]
