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

# abar of a terminal SNR of zero, so that sigma stays finite: half precision's smallest number, as diffusers has it.
_LEAST_ALPHA = 2.0**-24
_NO_SIGNAL = 2.0**40  # sigma of a terminal SNR of zero where diffusers leaves abar at zero
_LEAST_ALPHA_WEBUI = 4.8973451890853435e-08  # that of its `rescale_zero_terminal_snr_abar` (modules/sd_models.py)


@dataclass(frozen=True)
class NoiseModel:
    """`config` is the content of a `scheduler_config.json` over the defaults of the class that reads it.

    webui: betas are float64 and noise levels float32, as in Stable Diffusion's own code and AUTOMATIC1111, rather than
    the other way round, as in diffusers. The last bit of a level tells where the noise is a Brownian path's: levels
    that differ by 1e-6 ask the path at other places.
    """

    config: Mapping[str, Any]
    webui: bool = False

    @property
    def train_steps(self) -> int:
        return int(self.config["num_train_timesteps"])

    @cached_property
    def alphas_cumprod(self) -> Array:
        """abar, float64 [train_steps], of float32 values."""
        betas = self._betas()
        rescale = self.config.get("rescale_betas_zero_snr")
        if rescale and not self.webui:
            betas = zero_terminal_snr(betas)
        alphas = _cumprod(1 - betas)
        if rescale and self.webui:
            alphas = _stretched(np.sqrt(alphas)) ** 2
        if rescale:
            alphas[-1] = _LEAST_ALPHA_WEBUI if self.webui else _LEAST_ALPHA
        if not (alphas[0] < 1 and alphas[-1] > 0 and (np.diff(alphas) < 0).all()):  # NaN too
            raise UsageError(
                "the betas of scheduler_config.json give noise levels that don't rise from timestep to timestep, or not "
                "finite ones; use the file that the model was trained with"
            )
        return alphas.astype(np.float64)

    def _betas(self) -> NDArray[np.floating[Any]]:
        c, n, dtype = self.config, self.train_steps, np.float64 if self.webui else np.float32
        start, end = c["beta_start"], c["beta_end"]
        if c.get("trained_betas") is not None:
            return np.asarray(c["trained_betas"], dtype)
        if c["beta_schedule"] == "scaled_linear":
            return np.asarray(linspace(start**0.5, end**0.5, n, dtype).astype(dtype) ** 2)
        if c["beta_schedule"] == "linear":
            return linspace(start, end, n, dtype).astype(dtype)
        raise UsageError(f"beta_schedule {c['beta_schedule']!r} is not supported; use linear or scaled_linear")

    def rounded(self, levels: Array) -> Array:
        """To float32 where the web UI's levels are that; float64 still."""
        return levels.astype(np.float32).astype(np.float64) if self.webui else levels

    def even(self, start: float, end: float, n: int) -> Array:
        """n numbers from start to end, at the precision that levels have here."""
        return linspace(start, end, n, np.float32 if self.webui else np.float64)

    @cached_property
    def sigmas(self) -> Array:
        """One a training timestep, rising."""
        a = self.alphas_cumprod
        return self.rounded(np.sqrt(self.rounded(self.rounded(1 - a) / a)))

    @cached_property
    def plain_sigmas(self) -> Array:
        """As `sigmas`, for diffusers' classes that leave a terminal SNR of zero at zero: the last is beyond all signal.

        A network that predicts noise can't be asked there, so for such a model it is as in `sigmas`.
        """
        if not self.config.get("rescale_betas_zero_snr") or self.config["prediction_type"] == "epsilon":
            return self.sigmas
        return np.append(self.sigmas[:-1], _NO_SIGNAL)

    @cached_property
    def log_sigmas(self) -> Array:
        return self.rounded(np.log(self.sigmas))

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
        return self.rounded(np.exp(self.rounded(np.interp(timesteps, np.arange(len(logs), dtype=np.float64), logs))))

    def log_timestep(self, sigmas: Array) -> Array:
        """The inverse of `log_sigma_at`."""
        logs = self.log_sigmas
        return np.interp(np.log(sigmas), logs, np.arange(len(logs), dtype=np.float64))


def linspace(start: float, end: float, n: int, dtype: type[np.floating[Any]]) -> Array:
    """torch's, bit for bit, as float64: from both ends towards the middle, in a step of that precision."""
    if n == 1:
        return np.array([dtype(start)], np.float64)
    first, last = dtype(start), dtype(end)
    step, i = np.float64((last - first) / dtype(n - 1)), np.arange(n)
    values = np.where(i < n // 2, first + step * i, last - step * (n - 1 - i))
    return np.asarray(values.astype(dtype), np.float64)


def zero_terminal_snr(betas: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Algorithm 1 of Lin et al. 2023 (arXiv:2305.08891), on to betas again."""
    alphas_cumprod = _stretched(np.sqrt(_cumprod(1 - betas))) ** 2
    alphas = np.concatenate((alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]))
    return np.asarray(1 - alphas, np.float32)


def _stretched(roots: NDArray[np.float32]) -> NDArray[np.float32]:
    """sqrt(abar) moved and stretched until its last is 0 and its first what it was."""
    return np.asarray((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1])), np.float32)


def _cumprod(alphas: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """torch accumulates the products of float32 numbers in double."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)
