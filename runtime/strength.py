"""The end of a schedule, for walks that start from a picture: which step is the first, as the references choose it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import UsageError
from .a1111_grids import unipc_from, webui_timesteps
from .noise_model import NoiseModel
from .schedulers import Scheduler
from .schedules import Schedule

_WHOLE = 0.999  # the web UI's largest strength: it always keeps a little of the picture


def ending(schedule: Schedule, scheduler: Scheduler, model: NoiseModel, steps: int, strength: float) -> Schedule:
    """The last `strength` of the schedule. UsageError for a scheduler without a fixed one, and for less than a step.

    diffusers takes floor(steps * strength) steps (its pipelines' `get_timesteps`). The web UI takes one more of
    k-diffusion's (`sample_img2img` in `modules/sd_samplers_kdiffusion.py`); for those of timesteps see `_timesteps_ending`.
    """
    if not scheduler.any_schedule:
        raise UsageError(f"{scheduler.name} chooses its own noise levels and can't start from a picture")
    count = len(schedule)
    if scheduler.webui:
        taken = int(min(strength, _WHOLE) * steps) + (-1 if scheduler.counts_timesteps else 1)
    else:
        taken = int(steps * strength)
    if taken < 1:
        raise UsageError(
            f"strength {strength:g} of {steps} steps is not one step; the least is {1 / steps:.3g}, or take more steps"
        )
    if scheduler.counts_timesteps and schedule.sigmas[-1] > 0:  # not on a schedule by name, which ends at zero
        return _timesteps_ending(schedule, model, steps, taken)
    skipped = max(count - min(taken, count), 0)
    if not skipped:
        return schedule
    if schedule.retake and not scheduler.webui:
        return _plms_ending(schedule, model, steps, skipped)
    rest = _from(schedule, skipped)
    return rest if scheduler.webui else replace(rest, above=schedule.sigmas[:skipped])


def _from(schedule: Schedule, first: int) -> Schedule:
    """Multistep samplers have nothing to look back on at their first step, wherever that stands: orders rise anew."""
    orders, landings = schedule.orders, schedule.landings
    sigmas = schedule.sigmas[first:]
    return replace(
        schedule,
        sigmas=sigmas,
        timesteps=schedule.timesteps[first:],
        landings=None if landings is None else landings[first:],
        orders=None if orders is None else tuple(min(order, i + 1) for i, order in enumerate(orders[first:])),
        retake=(float(sigmas[0]), float(sigmas[1])) if schedule.retake and sigmas[1] > 0 else None,
        span=schedule.levels_span,
    )


def _timesteps_ending(schedule: Schedule, model: NoiseModel, steps: int, taken: int) -> Schedule:
    """As `sample_img2img` in the web UI's `modules/sd_samplers_timesteps.py`: of its timesteps it keeps the lowest
    floor(steps * strength), gives the picture the noise of the next higher one, and walks between those it kept. UniPC
    takes a step more, evenly from the highest of them to the first of training.
    """
    timesteps = webui_timesteps(model, steps)
    noise = float(model.sigmas[timesteps[min(taken + 1, len(timesteps) - 1)]])  # strides of one: once
    if schedule.orders is not None:
        return replace(unipc_from(model, float(timesteps[taken]), taken + 1), noised_at=noise)
    return replace(_from(schedule, len(schedule) - taken), noised_at=noise)


def _plms_ending(schedule: Schedule, model: NoiseModel, steps: int, skipped: int) -> Schedule:
    """diffusers' PNDM names its second timestep twice, the second time for the retake, and counts it in what it skips.

    So its walk begins one step higher up, takes that step twice, and reads the x it has reached as that of the level
    after the next; or where only the first timestep was skipped, takes the second one twice.
    """
    twice = [0, *range(1, len(schedule)), len(schedule)]  # as many levels as sigmas
    named = [twice[0], twice[1], *twice[1:-1]][skipped:]  # as PNDM lists them
    first, second, *rest = named
    landings = schedule.landings if schedule.landings is not None else schedule.sigmas[1:]
    top = min(int(schedule.timesteps[second]) + model.train_steps // steps, model.train_steps - 1)
    walked = [first, *rest]
    return replace(
        schedule,
        sigmas=np.append(schedule.sigmas[walked], schedule.sigmas[-1]),
        timesteps=schedule.timesteps[walked],
        landings=landings[walked],
        retake=(float(model.sigmas[top]), float(schedule.sigmas[second])),
    )
