"""Noise levels and timesteps: which sigmas a sampler walks, and which t the network is told at each.

Latents are in sigma units throughout, x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364), where
sigma = sqrt((1 - abar) / abar). The grids are diffusers' own, with its rounding, so that a model's
`scheduler_config.json` gives here the steps it gives there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """What a sampler walks.

    sigmas: n + 1 falling noise levels, the last where the walk ends. timesteps: n, what the network is told at
    sigmas[:-1]. landings: n, the level each step lands on where that is not the next sigma (None: it is). scale: the
    first x is noise times this. `train_sigmas` are the model's own, one a training timestep.
    """

    sigmas: Array
    timesteps: Array
    scale: float
    train_sigmas: Array
    landings: Array | None = None
    _exact: dict[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_exact", dict(zip(self.sigmas[:-1].tolist(), self.timesteps.tolist(), strict=True)))

    def __len__(self) -> int:
        return len(self.timesteps)

    def intervals(self) -> Iterator[tuple[float, float]]:
        return zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True)

    def timestep(self, sigma: float) -> float:
        """t of sigma: the grid's own on the grid, else interpolated in log sigma."""
        if sigma in self._exact:
            return self._exact[sigma]
        logs = np.log(self.train_sigmas)
        return float(np.interp(np.log(sigma), logs, np.arange(len(logs), dtype=np.float64)))


@dataclass(frozen=True)
class NoiseModel:
    """The forward process a model was trained on, and the options its `scheduler_config.json` carries.

    `config` is that file's content over the defaults of the diffusers class that will read it (see `schedulers.py`).
    """

    config: Mapping[str, Any]

    @property
    def train_steps(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def alphas_cumprod(self) -> Array:
        """abar, float64 [train_steps], computed from float32 betas as torch does."""
        c, n = self.config, self.train_steps
        start, end = c["beta_start"], c["beta_end"]
        if c.get("trained_betas") is not None:
            betas = np.asarray(c["trained_betas"], np.float32)
        elif c["beta_schedule"] == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2
        elif c["beta_schedule"] == "linear":
            betas = np.linspace(start, end, n, dtype=np.float32)
        else:
            raise UsageError(f"beta_schedule {c['beta_schedule']!r} is not supported; use linear or scaled_linear")
        return np.cumprod(1.0 - betas.astype(np.float32), dtype=np.float32).astype(np.float64)

    @property
    def sigmas(self) -> Array:
        a = self.alphas_cumprod
        return np.asarray(np.sqrt((1 - a) / a), np.float64)

    def spaced(self, n: int, extra: int = 0) -> Array:
        """n falling timesteps by the config's `timestep_spacing` (Lin et al. 2023, arXiv:2305.08891, table 2).

        `extra` = 1 is DPM-Solver's habit of dividing by n + 1 and dropping the last, for leading and linspace.
        """
        total, spacing = self.train_steps, self.config["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, total - 1, n + extra)[::-1][:n]
        if spacing == "leading":
            t = np.arange(n + extra) * (total // (n + extra))
            return np.asarray(t[::-1][:n] + self.config["steps_offset"], np.float64)
        if spacing == "trailing":
            # diffusers steps by total / n with arange, which for some n overshoots by one element; ours never does
            return np.round(total - np.arange(n) * (total / n)) - 1.0
        raise UsageError(f"timestep_spacing {spacing!r} is not known; use leading, trailing or linspace")

    def sigma_at(self, timesteps: Array) -> Array:
        sigmas = self.sigmas
        return np.interp(timesteps, np.arange(len(sigmas), dtype=np.float64), sigmas)

    def log_timestep(self, sigmas: Array) -> Array:
        """The inverse, interpolated in log sigma."""
        logs = np.log(self.sigmas)
        return np.interp(np.log(sigmas), logs, np.arange(len(logs), dtype=np.float64))

    def karras(self, n: int, low: float, high: float, rho: float = 7.0) -> Array:
        """n sigmas from high to low, equation 5 of Karras et al. 2022 (arXiv:2206.00364)."""
        ramp = np.linspace(0, 1, n)
        return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, np.float64)


Grid = Callable[[NoiseModel, int], Schedule]


def _final_sigma(model: NoiseModel) -> float:
    return float(model.sigmas[0]) if model.config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0


def euler(model: NoiseModel, n: int) -> Schedule:
    """diffusers' EulerDiscrete and EulerAncestralDiscrete: fractional timesteps, sigmas interpolated linearly."""
    timesteps = model.spaced(n)
    if model.config["timestep_spacing"] != "linspace":
        timesteps = np.round(timesteps)
    sigmas = model.sigma_at(timesteps)
    if model.config.get("use_karras_sigmas"):
        sigmas = model.karras(n, float(sigmas[-1]), float(sigmas[0]))
        timesteps = model.log_timestep(sigmas)
    top = float(sigmas.max())
    scale = top if model.config["timestep_spacing"] in ("linspace", "trailing") else (top**2 + 1) ** 0.5
    return Schedule(np.append(sigmas, _final_sigma(model)), timesteps, scale, model.sigmas)


def ddim(model: NoiseModel, n: int) -> Schedule:
    """diffusers' DDIM: whole timesteps; each step lands train_steps // n earlier, wherever the next one stands."""
    timesteps = np.round(model.spaced(n))
    alphas, train = model.alphas_cumprod, model.sigmas
    end = 0.0 if model.config["set_alpha_to_one"] else float(train[0])
    back = timesteps.astype(np.int64) - model.train_steps // n
    landings = np.where(back >= 0, train[np.maximum(back, 0)], end)
    index = timesteps.astype(np.int64)
    if index.max() >= len(alphas):
        raise UsageError(
            f"{n} steps with steps_offset {model.config['steps_offset']} ask for timestep {index.max()}; the model has {len(alphas)}"
        )
    sigmas = np.append(train[index], landings[-1])
    return Schedule(sigmas, timesteps, float(np.hypot(sigmas[0], 1)), train, landings)


def dpm_multi(model: NoiseModel, n: int) -> Schedule:
    """diffusers' DPMSolverMultistep: whole timesteps; Karras sigmas span all of the training range."""
    train = model.sigmas
    if model.config.get("use_karras_sigmas"):
        sigmas = model.karras(n, float(train[0]), float(train[-1]))
        timesteps = np.round(model.log_timestep(sigmas))
    else:
        timesteps = np.round(model.spaced(n, extra=1))
        sigmas = model.sigma_at(timesteps)
    return Schedule(np.append(sigmas, _final_sigma(model)), timesteps, float(np.hypot(sigmas[0], 1)), train)


def lcm(model: NoiseModel, n: int) -> Schedule:
    """Latent consistency models (arXiv:2310.04378): n of the `original_inference_steps` it was distilled on."""
    original = int(model.config["original_inference_steps"])
    if n > original:
        raise UsageError(f"LCM was distilled on {original} steps and can't take {n}; allowed: 1 to {original}")
    origin = np.arange(1, original + 1) * (model.train_steps // original) - 1
    pick = np.floor(np.linspace(0, original, n, endpoint=False)).astype(np.int64)
    timesteps = origin[::-1][pick].astype(np.float64)
    sigmas = model.sigma_at(timesteps)
    return Schedule(np.append(sigmas, 0.0), timesteps, float(np.hypot(sigmas[0], 1)), model.sigmas)
