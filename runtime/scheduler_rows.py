"""The rows of the schedulers' table. See `schedulers.py` for what a row says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from . import a1111_grids, multistep, samplers, schedules, sde, singlestep
from .schedulers import Scheduler

# -- diffusers --------------------------------------------------------------------------------------------------------

_OFF = (False, None)
_NO_CLIPPING = {"clip_sample": _OFF, "thresholding": _OFF}
_EULER = {"interpolation_type": ("linear",), "timestep_type": ("discrete",), "sigma_min": (None,), "sigma_max": (None,)}
_SOLVER = {
    "thresholding": _OFF, "use_flow_sigmas": _OFF, "use_lu_lambdas": _OFF, "variance_type": (None,),
    "lambda_min_clipped": (-math.inf, None), "use_dynamic_shifting": _OFF,
}  # fmt: skip
# What diffusers takes other classes' solver types and algorithms for.
_MIDPOINT = {"algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho", "bh1", "bh2")}
_SOLVER_DEFAULTS = {"solver_order": 2, "euler_at_final": False}
# Classes that know no such options: from_config leaves them out.
_TO_ZERO: Mapping[str, Any] = {"final_sigmas_type": "zero"}
_NO_SPACING: Mapping[str, Any] = {f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta")}
# nor zero terminal SNR: they walk the plain betas even for a model that was trained on rescaled ones
_OLD: Mapping[str, Any] = {**_TO_ZERO, "rescale_betas_zero_snr": False}
_KARRAS: Mapping[str, Any] = {**_NO_SPACING, "use_karras_sigmas": True}
_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_FEW = {
    **_LATENT_BETAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "original_inference_steps": 50,
}  # fmt: skip
_dpm_multi = partial(schedules.dpm, orders=schedules.multistep_orders)
_dpm_single = partial(schedules.dpm, orders=schedules.singlestep_orders)
_unipc = partial(schedules.dpm, orders=schedules.unipc_orders)
_kdpm2 = partial(schedules.euler, whole_karras=True)

# Made for distilled models, the same in both families.
_FEW_STEP_ROWS = (
    Scheduler(
        "LCM", "diffusers", samplers.lcm, schedules.few_steps, 1, random=True, diffusers="LCMScheduler",
        defaults=_FEW, fixed={**_NO_CLIPPING, "timestep_scaling": (10.0,)},
    ),
    Scheduler(
        "TCD", "diffusers", samplers.tcd, partial(schedules.few_steps, to_zero=False), 1,
        eta=0.3, diffusers="TCDScheduler", defaults=_FEW, fixed=_NO_CLIPPING,
    ),
    Scheduler(
        "Euler Lightning", "diffusers", samplers.euler, schedules.euler, 1, diffusers="EulerDiscreteScheduler",
        forced={"timestep_spacing": "trailing"}, fixed=_EULER,
    ),
)  # fmt: skip

_DIFFUSERS_ROWS = (
    Scheduler(
        "DDIM", "diffusers", samplers.ancestral, schedules.ddim, 1, eta=0.0, diffusers="DDIMScheduler",
        # clip_sample: that of published files for latents; a file written for another class is silent on it
        defaults={"timestep_spacing": "leading", "set_alpha_to_one": True}, fixed=_NO_CLIPPING,
    ),
    Scheduler(
        "DPM Multi", "diffusers", multistep.dpm_multi, _dpm_multi, 2, diffusers="DPMSolverMultistepScheduler",
        defaults={**_SOLVER_DEFAULTS, "lower_order_final": True}, fixed={**_SOLVER, **_MIDPOINT, "solver_order": (1, 2, 3)},
    ),
    Scheduler(
        "DPM Multi Karras", "diffusers", multistep.dpm_multi, _dpm_multi, 2, diffusers="DPMSolverMultistepScheduler",
        defaults={**_SOLVER_DEFAULTS, "lower_order_final": True}, forced=_KARRAS,
        fixed={**_SOLVER, **_MIDPOINT, "solver_order": (1, 2, 3)},
    ),
    Scheduler(
        "DPM Single", "diffusers", singlestep.dpm_single, _dpm_single, 2, diffusers="DPMSolverSinglestepScheduler",
        defaults={**_SOLVER_DEFAULTS, "lower_order_final": False},
        forced={"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
        fixed={**_SOLVER, **_MIDPOINT, "solver_order": (1, 2, 3)},
    ),
    Scheduler(
        "Euler a", "diffusers", samplers.ancestral, schedules.euler, 1, eta=1.0,
        diffusers="EulerAncestralDiscreteScheduler", forced={**_NO_SPACING, **_TO_ZERO},
    ),
    Scheduler(
        "Euler", "diffusers", samplers.euler, schedules.euler, 1, diffusers="EulerDiscreteScheduler", fixed=_EULER
    ),
    Scheduler(
        "Heun", "diffusers", samplers.heun, schedules.euler, 2, 2, diffusers="HeunDiscreteScheduler",
        defaults=_LATENT_BETAS, forced=_OLD, fixed={"clip_sample": _OFF},
    ),
    Scheduler(
        "DPM2 a", "diffusers", samplers.dpm2, _kdpm2, 2, 2, eta=1.0,
        diffusers="KDPM2AncestralDiscreteScheduler", defaults=_LATENT_BETAS, forced=_OLD,
    ),
    Scheduler(
        "DPM2 a Karras", "diffusers", samplers.dpm2, _kdpm2, 2, 2, eta=1.0,
        diffusers="KDPM2AncestralDiscreteScheduler", defaults=_LATENT_BETAS, forced={**_OLD, **_KARRAS},
    ),
    Scheduler(
        "DPM2", "diffusers", samplers.dpm2, _kdpm2, 2, 2, diffusers="KDPM2DiscreteScheduler", defaults=_LATENT_BETAS,
        forced=_OLD,
    ),
    Scheduler(
        "DPM2 Karras", "diffusers", samplers.dpm2, _kdpm2, 2, 2, diffusers="KDPM2DiscreteScheduler",
        defaults=_LATENT_BETAS, forced={**_OLD, **_KARRAS},
    ),
    Scheduler("LMS", "diffusers", multistep.lms, schedules.euler, 2, diffusers="LMSDiscreteScheduler", forced=_OLD),
    Scheduler(
        "PNDM", "diffusers", multistep.plms, schedules.pndm, 2, diffusers="PNDMScheduler",
        # silent files mean True here: the published ones say so, or were written for another class
        defaults={"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": True},
        forced={"rescale_betas_zero_snr": False}, fixed={"skip_prk_steps": (True,)},
    ),
    Scheduler(
        "DDPM", "diffusers", samplers.ancestral, schedules.ddpm, 1, random=True, diffusers="DDPMScheduler",
        defaults={"timestep_spacing": "leading"},
        fixed={**_NO_CLIPPING, "variance_type": ("fixed_small", "fixed_small_log")},
    ),
    Scheduler(
        "UniPC", "diffusers", multistep.unipc, _unipc, 3, diffusers="UniPCMultistepScheduler",
        defaults={**_SOLVER_DEFAULTS, "lower_order_final": True},
        fixed={
            **_SOLVER, "solver_order": (1, 2, 3), "solver_type": ("bh2", "midpoint", "heun", "logrho"),
            "predict_x0": (True,), "disable_corrector": ([], None), "lower_order_final": (True,), "solver_p": (None,),
        },
    ),
)  # fmt: skip

# -- AUTOMATIC1111 ----------------------------------------------------------------------------------------------------

# Of the file only the noise model counts; what a class of diffusers would do with the rest does not.
_A1111_DEFAULTS = {**_LATENT_BETAS, "beta_schedule": "scaled_linear"}


def _k(name: str, sampler: Any, order: int, calls: float = 1, discard: bool = False, **rest: Any) -> list[Scheduler]:
    """A k-diffusion sampler under its plain name, and under those that end in a spacing's."""
    spaced = {"": "normal", **{f" {s.capitalize()}": s for s in rest.pop("spacings", ())}}
    return [
        Scheduler(
            name + suffix, "a1111", sampler, partial(a1111_grids.k_diffusion, own=own, discard=discard), order, calls,
            defaults=_A1111_DEFAULTS, **rest,
        )
        for suffix, own in spaced.items()
    ]  # fmt: skip


def _own(name: str, sampler: Any, grid: Any, order: int | None, calls: float | None = 1, **rest: Any) -> Scheduler:
    return Scheduler(name, "a1111", sampler, grid, order, calls, defaults=_A1111_DEFAULTS, **rest)


_K, _KE = ("karras",), ("karras", "exponential")
_2m_sde_heun = partial(sde.dpmpp_2m_sde, variant="heun")

_A1111_ROWS = (
    *_k("Euler a", samplers.ancestral, 1, eta=1.0),
    *_k("Euler", samplers.euler, 1),
    *_k("LMS", multistep.lms, 2, spacings=_K),
    *_k("Heun", samplers.heun, 2, 2),
    *_k("DPM2", samplers.dpm2, 2, 2, discard=True, spacings=_K),
    *_k("DPM2 a", samplers.dpm2, 2, 2, eta=1.0, discard=True, spacings=_K),
    *_k("DPM++ 2S a", singlestep.dpmpp_2s, 2, 2, eta=1.0, spacings=_K),
    *_k("DPM++ 2M", multistep.dpm_multi, 2, spacings=_K),
    *_k("DPM++ SDE", sde.dpmpp_sde, 2, 2, eta=1.0, brownian=sde.half_and_whole_steps, spacings=_K),
    *_k("DPM++ 2M SDE", sde.dpmpp_2m_sde, 2, eta=1.0, brownian=sde.whole_steps, spacings=_KE),
    *_k("DPM++ 2M SDE Heun", _2m_sde_heun, 2, eta=1.0, brownian=sde.whole_steps, spacings=_KE),
    *_k("DPM++ 3M SDE", sde.dpmpp_3m_sde, 2, eta=1.0, discard=True, brownian=sde.whole_steps, spacings=_KE),
    _own(
        "DPM fast", singlestep.dpm_fast, a1111_grids.dpm_fast, 3, None, eta=1.0, any_schedule=False,
    ),
    _own(
        "DPM adaptive", singlestep.dpm_adaptive, a1111_grids.dpm_adaptive, None, None, eta=1.0,
        any_schedule=False, adaptive=True,
    ),
    _own("Restart", samplers.restart, a1111_grids.restart, 2, 2, any_schedule=False, random=True),
    _own(
        "DDIM", samplers.ancestral, a1111_grids.ddim, 1, eta=0.0, least_steps=2,
        counts_timesteps=True,
    ),
    _own("PLMS", multistep.plms, a1111_grids.plms, 2, least_steps=2, counts_timesteps=True),
    _own(
        "UniPC", partial(multistep.unipc, variant="bh1"), a1111_grids.unipc, 3, least_steps=3,
        counts_timesteps=True,
    ),
)  # fmt: skip

ROWS = (
    *_DIFFUSERS_ROWS,
    *_FEW_STEP_ROWS,
    *_A1111_ROWS,
    *(replace(row, family="a1111") for row in _FEW_STEP_ROWS),
)
