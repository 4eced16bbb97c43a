"""The forward process a model was trained on: its noise levels by training timestep, and the way between the two.

Latents are in sigma units throughout, x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364), where
sigma = sqrt((1 - abar) / abar).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Array = NDArray[np.float64]

# abar of a terminal SNR of zero: half precision's smallest number, as diffusers has it, so that sigma stays finite.
_LEAST_ALPHA = 2.0**-24


@dataclass(frozen=True)
class NoiseModel:
    """`config` is the content of a `scheduler_config.json` over the defaults of the class that reads it."""

    config: Mapping[str, Any]

    @property
    def train_steps(self) -> int:
        return int(self.config["num_train_timesteps"])

    @cached_property
    def alphas_cumprod(self) -> Array:
        """abar, float64 [train_steps], computed from float32 betas as torch does."""
        betas = self._betas()
        rescale = self.config.get("rescale_betas_zero_snr")
        if rescale:
            betas = zero_terminal_snr(betas)
        alphas = np.cumprod(1 - betas, dtype=np.float32).astype(np.float64)
        if rescale:
            alphas[-1] = _LEAST_ALPHA
        return alphas

    def _betas(self) -> NDArray[np.float32]:
        c, n = self.config, self.train_steps
        start, end = c["beta_start"], c["beta_end"]
        if c.get("trained_betas") is not None:
            return np.asarray(c["trained_betas"], np.float32)
        if c["beta_schedule"] == "scaled_linear":
            return np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2
        if c["beta_schedule"] == "linear":
            return np.linspace(start, end, n, dtype=np.float32)
        raise UsageError(f"beta_schedule {c['beta_schedule']!r} is not supported; use linear or scaled_linear")

    @cached_property
    def sigmas(self) -> Array:
        """One a training timestep, rising."""
        a = self.alphas_cumprod
        return np.asarray(np.sqrt((1 - a) / a), np.float64)

    @cached_property
    def log_sigmas(self) -> Array:
        return np.asarray(np.log(self.sigmas), np.float64)

    def spaced(self, n: int, extra: int = 0) -> Array:
        """n falling timesteps by the config's `timestep_spacing` (Lin et al. 2023, arXiv:2305.08891, table 2).

        `extra` = 1 is DPM-Solver's habit of dividing by n + 1 and dropping the last, for leading and linspace.
        """
        total, spacing = self.train_steps, self.config["timestep_spacing"]
        extra = min(extra, max(total - n, 0))  # as many steps as timesteps leave nothing to drop
        if spacing == "linspace":
            return np.linspace(0, total - 1, n + extra)[::-1][:n]
        if spacing == "leading":
            t = np.arange(n + extra) * (total // (n + extra))
            # steps_offset reaches past the last timestep where the steps fill all the range: it then moves less
            offset = min(self.config["steps_offset"], total - 1 - int(t[-1]))
            return np.asarray(t[::-1][:n] + offset, np.float64)
        if spacing == "trailing":
            # diffusers steps by total / n with arange, which for some n overshoots by one element; ours never does
            return np.round(total - np.arange(n) * (total / n)) - 1.0
        raise UsageError(f"timestep_spacing {spacing!r} is not known; use leading, trailing or linspace")

    def sigma_at(self, timesteps: Array) -> Array:
        """Interpolated linearly, as diffusers does."""
        sigmas = self.sigmas
        return np.interp(timesteps, np.arange(len(sigmas), dtype=np.float64), sigmas)

    def log_sigma_at(self, timesteps: Array) -> Array:
        """Interpolated in log sigma, as k-diffusion does."""
        logs = self.log_sigmas
        return np.asarray(np.exp(np.interp(timesteps, np.arange(len(logs), dtype=np.float64), logs)), np.float64)

    def log_timestep(self, sigmas: Array) -> Array:
        """The inverse of `log_sigma_at`."""
        logs = self.log_sigmas
        return np.interp(np.log(sigmas), logs, np.arange(len(logs), dtype=np.float64))


def zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Algorithm 1 of Lin et al. 2023 (arXiv:2305.08891): sqrt(abar) moved and stretched until its last is 0."""
    roots = np.sqrt(np.cumprod(1 - betas, dtype=np.float32))
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    alphas_cumprod = roots**2
    alphas = np.concatenate((alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]))
    return np.asarray(1 - alphas, np.float32)
