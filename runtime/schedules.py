"""Schedules: which noise levels a sampler walks, and which timestep the network is told at each.

`Schedule`, and the grids of diffusers' scheduler classes with their rounding, so that a model's
`scheduler_config.json` gives here the steps it gives there. AUTOMATIC1111's grids are in `a1111_grids.py`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UsageError
from . import spacings
from .noise_model import Array, NoiseModel


@dataclass(frozen=True)
class Schedule:
    """What a sampler walks. `Scheduler.schedule` makes one.

    sigmas: n + 1 falling noise levels, the last where the walk ends. timesteps: n, what the network is told at
    sigmas[:-1]. scale: the first x is noise times this. train_sigmas: the model's own, one a training timestep.

    The rest is what some samplers' grids decide. landings: n, the level each step lands on where that is not the next
    sigma. orders: n, the order of each step. retake: from where to where PLMS takes its first step a second time.
    velocity: PLMS's history is of v. detours: falling levels that are walked again on reaching the last of them.
    sigma_units: a walk that ends above zero hands x over as it is, not in its variance-preserving form. span: the lowest
    and highest level above zero of the schedule that this one is the end of; its own, if not said. noised_at: the level
    to which a picture that the walk begins with is given noise, where that is not the first: it is then read there.
    above: the levels that a walk from a picture skipped, which diffusers' LMS reckons with though nothing is known there.
    """

    sigmas: Array
    timesteps: Array
    scale: float
    train_sigmas: Array
    landings: Array | None = None
    orders: tuple[int, ...] | None = None
    retake: tuple[float, float] | None = None
    velocity: bool = False
    detours: tuple[Array, ...] = ()
    sigma_units: bool = False
    span: tuple[float, float] | None = None
    noised_at: float | None = None
    above: Array | None = None
    _exact: dict[float, float] = field(init=False, repr=False, compare=False)
    _logs: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_exact", dict(zip(self.sigmas[:-1].tolist(), self.timesteps.tolist(), strict=True)))
        object.__setattr__(self, "_logs", np.log(self.train_sigmas).tolist())

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def total(self) -> int:
        """How many `Step`s a walk of all of it yields."""
        return len(self) + sum(len(detour) - 1 for detour in self.detours)

    @property
    def levels_span(self) -> tuple[float, float]:
        """Between which levels its noise lies, where that is a Brownian path's: the web UI spans the path over all of
        a schedule, also for a walk that begins in the middle of it."""
        above_zero = self.sigmas[self.sigmas > 0]
        return self.span or (float(above_zero.min()), float(above_zero.max()))

    def intervals(self) -> Iterator[tuple[float, float]]:
        return zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True)

    def timestep(self, sigma: float) -> float:
        """t of sigma: the grid's own on the grid, else interpolated in log sigma."""
        if sigma in self._exact:
            return self._exact[sigma]
        log, logs = math.log(sigma), self._logs
        i = min(max(bisect.bisect(logs, log), 1), len(logs) - 1)
        return min(max(i - 1 + (log - logs[i - 1]) / (logs[i] - logs[i - 1]), 0.0), len(logs) - 1.0)


Grid = Callable[[NoiseModel, int, "str | None"], Schedule]


def vp_scale(sigma: float) -> float:
    """Of the first x where the sampler's own form is variance-preserving: that form is then plain noise."""
    return float(np.hypot(sigma, 1))


def spaced_by(name: str, model: NoiseModel, n: int, **rest: Any) -> Schedule:
    """A spacing's levels over the model's range, then zero, for samplers whose own grid is another."""
    return to_zero(spacings.levels(name, model, n), model, **rest)


def to_zero(sigmas: Array, model: NoiseModel, **rest: Any) -> Schedule:
    """These levels, then zero, for a sampler whose own form is variance-preserving."""
    return Schedule(
        np.append(sigmas, 0.0), model.log_timestep(sigmas), vp_scale(float(sigmas[0])), model.sigmas, **rest
    )


def _spacing(model: NoiseModel, named: str | None) -> str | None:
    """The spacing asked for, by name or else by the config's `use_..._sigmas`."""
    flags = [name for name in ("karras", "exponential", "beta") if model.config.get(f"use_{name}_sigmas")]
    return named or (flags[0] if flags else None)


def _final_sigma(model: NoiseModel) -> float:
    return float(model.sigmas[0]) if model.config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0


def euler(model: NoiseModel, n: int, named: str | None = None, whole_karras: bool = False) -> Schedule:
    """diffusers' EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, LMSDiscrete and both KDPM2: fractional
    timesteps, sigmas interpolated linearly; Karras' and its like span what the timesteps span, not all of training.
    """
    timesteps = model.spaced(n)
    if model.config["timestep_spacing"] != "linspace":
        timesteps = np.round(timesteps)
    sigmas = model.sigma_at(timesteps)
    spacing = _spacing(model, named)
    if spacing:
        inner = spacing in ("karras", "exponential", "beta")  # the three that diffusers has
        ends = (float(sigmas[-1]), float(sigmas[0])) if inner else (None, None)
        sigmas = spacings.levels(spacing, model, n, *ends)
        timesteps = model.log_timestep(sigmas)
        if whole_karras and spacing == "karras":
            timesteps = np.round(timesteps)
    top = float(sigmas.max())
    scale = top if model.config["timestep_spacing"] in ("linspace", "trailing") else vp_scale(top)
    return Schedule(np.append(sigmas, _final_sigma(model)), timesteps, scale, model.sigmas, sigma_units=True)


def ddim(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """diffusers' DDIM: whole timesteps; each step lands train_steps // n earlier, wherever the next one stands."""
    if named:
        return spaced_by(named, model, n)
    timesteps = np.round(model.spaced(n))
    train = model.plain_sigmas
    end = 0.0 if model.config["set_alpha_to_one"] else float(train[0])
    index = timesteps.astype(np.int64)
    back = index - model.train_steps // n
    landings = np.where(back >= 0, train[np.maximum(back, 0)], end)
    sigmas = np.append(train[index], landings[-1])
    return Schedule(sigmas, timesteps, vp_scale(float(sigmas[0])), model.sigmas, landings)


def pndm(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """diffusers' PNDM with `skip_prk_steps`: DDIM's grid. The first step is taken again, from train_steps // n above
    the second timestep, whether or not the first stands there.
    """
    velocity = model.config["prediction_type"] == "v_prediction"
    if named:
        grid = spaced_by(named, model, n)
        retake = (float(grid.sigmas[0]), float(grid.sigmas[1])) if n > 1 else None
        return replace(grid, retake=retake, velocity=velocity)
    grid, retake = ddim(model, n), None
    if n > 1:
        start = min(int(grid.timesteps[1]) + model.train_steps // n, model.train_steps - 1)
        retake = (float(model.sigmas[start]), float(grid.sigmas[1]))
    return replace(grid, retake=retake, velocity=velocity)


def ddpm(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """diffusers' DDPM: whole timesteps, down to zero."""
    if named:
        return spaced_by(named, model, n)
    timesteps = np.round(model.spaced(n))
    sigmas = model.plain_sigmas[timesteps.astype(np.int64)]
    return Schedule(np.append(sigmas, 0.0), timesteps, vp_scale(float(sigmas[0])), model.sigmas)


Orders = Callable[[NoiseModel, int], "tuple[int, ...]"]


def dpm(model: NoiseModel, n: int, named: str | None = None, *, orders: Orders) -> Schedule:
    """diffusers' DPMSolverMultistep, DPMSolverSinglestep and UniPCMultistep: whole timesteps; Karras' and its like
    span all of the training range.
    """
    spacing = _spacing(model, named)
    if spacing:
        sigmas = spacings.levels(spacing, model, n)
        timesteps = model.log_timestep(sigmas)
        if spacing == "karras":
            timesteps = np.round(timesteps)
        elif spacing in ("exponential", "beta"):
            # kept there in a tensor of integers, the first of them a hair below the last timestep
            timesteps = np.maximum(np.floor(timesteps - 1e-6), 0)
    else:
        timesteps = np.round(model.spaced(n, extra=1))
        sigmas = model.sigma_at(timesteps)
    scale = vp_scale(float(sigmas[0]))
    return Schedule(np.append(sigmas, _final_sigma(model)), timesteps, scale, model.sigmas, orders=orders(model, n))


def multistep_orders(model: NoiseModel, n: int) -> tuple[int, ...]:
    """Rising to `solver_order` at the start; lower at the end, always where that is zero, else as the config says."""
    c, few = model.config, n < 15
    ends_low = c["euler_at_final"] or (c["lower_order_final"] and few) or _final_sigma(model) == 0
    orders = [min(int(c["solver_order"]), i + 1) for i in range(n)]
    if n > 1 and c["lower_order_final"] and few:
        orders[-2] = min(orders[-2], 2)
    if ends_low:
        orders[-1] = 1
    return tuple(orders)


def singlestep_orders(model: NoiseModel, n: int) -> tuple[int, ...]:
    """Runs of 1, 2, ..., `solver_order`: the last of a run spans it all. What remains at the end is of lower order."""
    order, to_zero = int(model.config["solver_order"]), _final_sigma(model) == 0
    orders = [i % order + 1 for i in range(n)]
    if to_zero or (model.config["lower_order_final"] and n % order == 0):
        orders[-1] = 1
    return tuple(orders)


def unipc_orders(model: NoiseModel, n: int) -> tuple[int, ...]:
    order = int(model.config["solver_order"])
    return tuple(min(order, i + 1, n - i) for i in range(n))


def few_steps(model: NoiseModel, n: int, named: str | None = None, to_zero: bool = True) -> Schedule:
    """Latent and trajectory consistency (arXiv:2310.04378, 2402.19159): n of the `original_inference_steps` that the
    model was distilled on; a trajectory ends at timestep 0, not at zero noise.
    """
    if named:
        return spaced_by(named, model, n)
    original = int(model.config["original_inference_steps"])
    if n > original:
        raise UsageError(f"this model was distilled on {original} steps and can't take {n}; allowed: 1 to {original}")
    if original > model.train_steps:
        raise UsageError(
            f"original_inference_steps is {original} and num_train_timesteps {model.train_steps}; "
            "the first may be at most the second: set it in scheduler_config.json, or use another scheduler"
        )
    origin = np.arange(1, original + 1) * (model.train_steps // original) - 1
    pick = np.floor(np.linspace(0, original, n, endpoint=False)).astype(np.int64)
    timesteps = origin[::-1][pick].astype(np.float64)
    sigmas = model.plain_sigmas[timesteps.astype(np.int64)]
    end = 0.0 if to_zero else float(model.sigmas[0])
    return Schedule(np.append(sigmas, end), timesteps, vp_scale(float(sigmas[0])), model.sigmas)
