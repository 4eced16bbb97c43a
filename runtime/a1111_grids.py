"""AUTOMATIC1111's grids: k-diffusion's, with timesteps interpolated in log sigma, and those of its own samplers.

Facts from its `modules/sd_samplers_kdiffusion.py`, `sd_samplers_timesteps.py`, `sd_samplers_timesteps_impl.py`,
`sd_samplers_extra.py` and `models/diffusion/uni_pc/uni_pc.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from . import spacings
from .noise_model import Array, NoiseModel
from .schedules import Schedule, to_zero, vp_scale


def k_diffusion(
    model: NoiseModel, n: int, named: str | None = None, *, own: str = "normal", discard: bool = False
) -> Schedule:
    """n levels by the row's own spacing, or the one named, then zero. discard: one more level, whose last is dropped,
    so that second-order steps end higher up.
    """
    return _to_zero(model, spacings.webui_levels(named or own, model, n + discard)[:n])


def _to_zero(model: NoiseModel, sigmas: Array, detours: tuple[Array, ...] = ()) -> Schedule:
    timesteps = model.log_timestep(sigmas)
    return Schedule(np.append(sigmas, 0.0), timesteps, float(sigmas[0]), model.sigmas, detours=detours)


def _every(model: NoiseModel, n: int) -> NDArray[np.int64]:
    """Timesteps from 0 in strides of train_steps // n: n of them only where n divides, else some more."""
    return np.arange(0, model.train_steps, model.train_steps // n, dtype=np.int64)


def webui_timesteps(model: NoiseModel, n: int) -> NDArray[np.int64]:
    """Of DDIM, PLMS and UniPC, rising. Moved past the last timestep, the highest of strides of one would stand there
    twice: it does so once here."""
    return np.unique(np.minimum(_every(model, n) + 1, model.train_steps - 1))


def ddim(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """DDIM and PLMS there: whole timesteps moved up by one; the walk ends at the lowest, so it has a step less."""
    if named:
        return to_zero(spacings.webui_levels(named, model, n), model)
    index = webui_timesteps(model, n)[::-1]
    sigmas = model.sigmas[index]
    return Schedule(sigmas, index[:-1].astype(np.float64), vp_scale(float(sigmas[0])), model.sigmas)


def plms(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    grid = ddim(model, n, named)
    return replace(grid, retake=(float(grid.sigmas[0]), float(grid.sigmas[1])))


def unipc(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """Even in timesteps from the last to the first, where it ends; log alpha interpolated; order 3."""
    if named:
        return to_zero(spacings.webui_levels(named, model, n), model, orders=_unipc_orders(n))
    return unipc_from(model, model.train_steps - 1.0, len(_every(model, n)))


def unipc_from(model: NoiseModel, top: float, n: int) -> Schedule:
    """n steps even in timesteps from `top` to the first."""
    timesteps = np.linspace(top, 0, n + 1)
    log_alphas = np.interp(timesteps, np.arange(model.train_steps), np.log(model.alphas_cumprod))
    sigmas = np.sqrt(np.expm1(-log_alphas))
    scale = vp_scale(float(sigmas[0]))
    return Schedule(sigmas, timesteps[:-1], scale, model.sigmas, orders=_unipc_orders(n))


def _unipc_orders(n: int) -> tuple[int, ...]:
    return tuple(min(3, i + 1, n - i) for i in range(n))


def dpm_fast(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """n model calls, three a step as far as they go, even in log sigma, down to the lowest sigma (DPM-Solver-fast,
    Lu et al. 2022, arXiv:2206.00927, appendix D.4).
    """
    steps = n // 3 + 1
    orders = (3,) * (steps - 2) + (2, 1) if n % 3 == 0 else (3,) * (steps - 1) + (n % 3,)
    sigmas = spacings.exponential(model, steps + 1, float(model.sigmas[0]), float(model.sigmas[-1]))
    timesteps, top = model.log_timestep(sigmas[:-1]), float(sigmas[0])
    return Schedule(sigmas, timesteps, top, model.sigmas, orders=orders, sigma_units=True)


def dpm_adaptive(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """The two ends: the sampler chooses what lies between, however many steps are asked for."""
    sigmas = model.sigmas[[-1, 0]]
    return Schedule(sigmas, model.log_timestep(sigmas[:1]), float(sigmas[0]), model.sigmas, sigma_units=True)


def restart(model: NoiseModel, n: int, named: str | None = None) -> Schedule:
    """Karras' levels; from 20 steps on, some are spent on walking again from about 2 to about 0.1, once or twice."""
    again, times = (0, 0) if n < 20 else (9, 1) if n < 36 else (n // 4, 2)
    sigmas = spacings.levels("karras", model, n - again * times)
    bottom, top = (int(np.abs(sigmas - level).argmin()) for level in (0.1, 2.0))
    if not times or top >= bottom:
        return _to_zero(model, sigmas)
    detour = spacings.karras(model, again + 1, float(sigmas[bottom]), float(sigmas[top]))
    detour[-1] = sigmas[bottom]  # exactly, not up to rounding: there the walk goes on
    return _to_zero(model, sigmas, (detour,) * times)
