"""The schedulers by name: one row each of sampler, grid, and the options of the diffusers class it equals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, unknown
from . import samplers, schedules
from .samplers import Sampler
from .schedules import Grid, NoiseModel, Schedule

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Scheduler:
    """A named scheduler.

    diffusers: the class whose numbers it gives. defaults: that class's own, where a `scheduler_config.json` is silent.
    forced: what the name itself says, whatever the file says. fixed: options that are implemented for these values
    only; any other value is refused, never ignored.
    """

    name: str
    diffusers: str
    sampler: Sampler
    grid: Grid
    defaults: Options = field(default_factory=dict)
    forced: Options = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def noise_model(self, config: Options) -> NoiseModel:
        """The model's `scheduler_config.json` read as diffusers' `from_config` of this class reads it."""
        written = {k: v for k, v in config.items() if not k.startswith("_")}
        merged = {**_DEFAULTS, **self.defaults, **written, **self.forced}
        for key, allowed in {**_FIXED, **self.fixed}.items():
            if merged.get(key, allowed[0]) not in allowed:
                values = ", ".join(map(repr, allowed))
                raise UsageError(
                    f"{self.name}: {key} {merged[key]!r} in scheduler_config.json is not supported; allowed: {values}"
                )
        return NoiseModel(merged)

    def schedule(self, config: Options, steps: int) -> Schedule:
        return self.grid(self.noise_model(config), steps)


_DEFAULTS: Options = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
}  # fmt: skip
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "rescale_betas_zero_snr": (False, None),
}
_NO_OTHER_GRID = dict.fromkeys(
    ("use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas"), (False, None)
)
_NO_CLIPPING = {"clip_sample": (False, None), "thresholding": (False, None)}
_EULER = {"interpolation_type": ("linear",), "timestep_type": ("discrete",), **_NO_OTHER_GRID}
_DPM = {
    "algorithm_type": ("dpmsolver++",), "solver_order": (2,), "solver_type": ("midpoint",),
    "lower_order_final": (True,), "euler_at_final": (False, None), "thresholding": (False, None), **_NO_OTHER_GRID,
}  # fmt: skip
_LCM_DEFAULTS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
    "original_inference_steps": 50,
}  # fmt: skip
_DDIM_DEFAULTS = {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True}

SCHEDULERS: dict[str, Scheduler] = {
    s.name: s
    for s in (
        Scheduler("Euler", "EulerDiscreteScheduler", samplers.euler, schedules.euler, fixed=_EULER),
        Scheduler(
            "Euler a",
            "EulerAncestralDiscreteScheduler",
            samplers.euler_ancestral,
            schedules.euler,
            forced={"use_karras_sigmas": False},
        ),
        Scheduler("DDIM", "DDIMScheduler", samplers.ddim, schedules.ddim, _DDIM_DEFAULTS, fixed=_NO_CLIPPING),
        Scheduler("DPM Multi", "DPMSolverMultistepScheduler", samplers.dpm_multi, schedules.dpm_multi, fixed=_DPM),
        Scheduler(
            "DPM Multi Karras",
            "DPMSolverMultistepScheduler",
            samplers.dpm_multi,
            schedules.dpm_multi,
            forced={"use_karras_sigmas": True},
            fixed=_DPM,
        ),
        Scheduler("LCM", "LCMScheduler", samplers.lcm, schedules.lcm, _LCM_DEFAULTS, fixed=_NO_CLIPPING),
    )
}


def get_scheduler(name: str) -> Scheduler:
    """By name, upper or lower case; UsageError lists what there is."""
    for scheduler in SCHEDULERS.values():
        if name.lower() == scheduler.name.lower():
            return scheduler
    raise unknown("scheduler", name, SCHEDULERS)


def scheduler_named_in(config: Options) -> str:
    """The name of the scheduler that a `scheduler_config.json` was written for."""
    written = config.get("_class_name")
    for scheduler in SCHEDULERS.values():
        if scheduler.diffusers == written:
            return scheduler.name
    known = sorted({s.diffusers for s in SCHEDULERS.values()})
    raise UsageError(
        f"scheduler_config.json names {written!r}, which is not implemented; name one with --scheduler ({', '.join(SCHEDULERS)}). Implemented: {', '.join(known)}"
    )
