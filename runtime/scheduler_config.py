"""A model's `scheduler_config.json`: its values checked, and read as diffusers' pipelines read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..bundle import Bundle
from .schedulers import get_scheduler, scheduler_named_in

FILE = "scheduler/scheduler_config.json"
MAX_TIMESTEPS = 100_000  # a hundred times what any published model was trained on


class Fault(NamedTuple):
    """A key whose value can't be used, and what it must be."""

    key: str
    got: Any
    wanted: str


def read_scheduler_config(bundle: Bundle) -> dict[str, Any]:
    """Return the bundle's scheduler configuration. BundleError for a value that can't be used."""
    config = bundle.scheduler_config
    if fault := fault_in(config):
        raise bundle.misconfigured("scheduler", *fault, file=FILE)
    return as_pipelines_read(config, bundle.sdxl)


def as_pipelines_read(config: Mapping[str, Any], sdxl: bool) -> dict[str, Any]:
    """Return the configuration as diffusers' pipelines change it when they are made (diffusers 0.42.1).

    Those of the SD kind set `steps_offset` to 1 and `clip_sample` to False, whatever the file says. Those of the SDXL
    kind take the file as it is.
    """
    return dict(config) if sdxl else {**config, "steps_offset": 1, "clip_sample": False}


def check_drawable(config: Mapping[str, Any], defaults: Mapping[str, Any], cure: str | None = None) -> None:
    """Raise UsageError unless images can be drawn with the scheduler that is used when a request names none.

    `config`: as `as_pipelines_read` gives it. `defaults`: the bundle's; without a scheduler among them, it is the one
    whose configuration it is. `cure`: what to do about one that is not implemented.
    """
    name = defaults.get("scheduler") or scheduler_named_in(config, cure)
    family = defaults.get("family") or "diffusers"
    scheduler = get_scheduler(name, family)
    model = scheduler.noise_model(config)
    scheduler.schedule(model, min(max(scheduler.least_steps, 4), model.train_steps))


def fault_in(config: Mapping[str, Any]) -> Fault | None:
    """Return the first value that is of another type or range than diffusers writes; None if all can be used."""
    for key, (allows, wanted) in _ALLOWED.items():
        if key in config and not allows(config[key]):
            return Fault(key, config[key], wanted)
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != count:
        return Fault("trained_betas", f"{len(betas)} numbers", f"as many numbers as num_train_timesteps says, {count}")
    # as diffusers: every `count // original`th timestep is one that the model was distilled on
    if (original := config.get("original_inference_steps", 1)) > count:
        return Fault("original_inference_steps", original, f"at most num_train_timesteps, {count}")
    return None


def _is_count(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _are_betas(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and 0 < len(value) <= MAX_TIMESTEPS and all(_is_beta(beta) for beta in value)
    )


_COUNT = (_is_count(1, MAX_TIMESTEPS), f"a whole number from 1 to {MAX_TIMESTEPS}")
_BETA = (_is_beta, "a number above 0 and below 1")
_FLAG = (lambda value: value is None or isinstance(value, bool), "true or false")
_WORD = (lambda value: isinstance(value, str), "a text")
_ORDER = (_is_count(1, 10), "a whole number from 1 to 10")
_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _COUNT,
    "original_inference_steps": _COUNT,
    "steps_offset": (_is_count(0, MAX_TIMESTEPS), f"a whole number from 0 to {MAX_TIMESTEPS}"),
    "solver_order": _ORDER,
    "beta_start": _BETA,
    "beta_end": _BETA,
    "trained_betas": (_are_betas, f"null, or a list of 1 to {MAX_TIMESTEPS} numbers above 0 and below 1"),
    "timestep_scaling": (
        lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
        "a number above 0",
    ),
    **dict.fromkeys(
        (
            "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "clip_sample",
            "thresholding", "set_alpha_to_one", "lower_order_final", "euler_at_final", "skip_prk_steps",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing"), _WORD),
    "final_sigmas_type": (lambda value: value is None or isinstance(value, str), "a text, or null"),
}  # fmt: skip
