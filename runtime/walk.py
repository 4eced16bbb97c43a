"""A request's walk from noise to latents: seeds, schedule, sampler and network put together. Knows no bundle, no text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from .denoiser import Denoiser
from .init_image import Moments
from .noise_model import NoiseModel
from .prefetch import Prefetch
from .request import Request
from .rng import NoiseSource
from .samplers import Array, Noise, Step
from .schedulers import Scheduler
from .schedules import Schedule
from .strength import ending

Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Network:
    """Where the network runs; `name` is the engine's, for errors. shape: of one sample's latents, [c, h, w]."""

    engine: Engine
    name: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What a request comes to on a model. total: how many steps will be yielded, None where the sampler decides."""

    scheduler: Scheduler
    model: NoiseModel
    schedule: Schedule
    total: int | None


def make_plan(request: Request, scheduler_config: Mapping[str, Any]) -> Plan:
    """UsageError for steps or a schedule that the sampler can't take, and for a model that it can't run.

    With a picture to start from it is the end of the schedule, the share of it that `request.strength` says.
    """
    scheduler = request.sampling
    model = scheduler.noise_model(scheduler_config)
    schedule = scheduler.schedule(model, request.steps, request.schedule)
    if request.image is not None:
        schedule = ending(schedule, scheduler, model, request.steps, request.strength)
    return Plan(scheduler, model, schedule, None if scheduler.adaptive else schedule.total)


def walk(
    request: Request,
    plan: Plan,
    network: Network,
    conditioning: Feeds,
    seeds: Sequence[int] | None = None,
    start: Moments | None = None,
) -> Generator[Step, None, None]:
    """Each step's latents, the last one's at the scale that the decoder reads. Closing it frees what it holds.

    seeds: of each sample; the request's own, if not said. start: what to start from where that is not noise alone; its
    own noise is drawn first.
    """
    seeds = request.seeds if seeds is None else seeds
    if plan.total is None and len(seeds) > 1:
        yield from _apart(request, plan, network, conditioning, seeds)
        return
    source = NoiseSource(seeds, request.rng, request.noise_dtype)
    denoise = Denoiser(
        network.engine, plan.schedule, conditioning, request.guidance, plan.model.config["prediction_type"],
        rescale=request.guidance_rescale, engine_name=network.name,
    )  # fmt: skip
    if start is None:
        x = source(network.shape) * np.float32(plan.schedule.scale)
    else:
        x = noised(start.draw(source), source(network.shape), plan.schedule)
    with _drawing(plan, source, network.shape) as noise:
        for step in plan.scheduler.sampler(denoise, x, plan.schedule, noise):
            denoise.step += 1
            yield _at_its_end(step, plan.schedule)


def noised(picture: Array, noise: Array, schedule: Schedule) -> Array:
    """What a walk from a picture begins with. Noised at another level than the first, its variance-preserving form is
    read as of the first, which is the form that samplers of timesteps have it in."""
    first = float(schedule.sigmas[0])
    level = schedule.noised_at or first
    x: Array = picture + noise * np.float32(level)
    x *= np.float32(math.hypot(1, first) / math.hypot(1, level))
    return x


@contextlib.contextmanager
def _drawing(plan: Plan, source: NoiseSource, shape: tuple[int, ...]) -> Iterator[Noise]:
    """The sampler's noise, drawn while the network runs; a sampler that draws none costs no thread."""
    if not plan.scheduler.stochastic:
        yield lambda sigma, sigma_next: source(shape)
    elif plan.scheduler.brownian is not None:
        tree = source.brownian(shape, *plan.schedule.levels_span)
        with Prefetch(tree, plan.scheduler.brownian(plan.schedule)) as noise:
            yield noise
    else:
        with Prefetch(lambda sigma, sigma_next: source(shape)) as noise:
            yield noise


def _at_its_end(step: Step, schedule: Schedule) -> Step:
    """Some walks end above zero: their x is handed over in the form that the sampler's own is, as references do."""
    if schedule.sigma_units or not 0 < step.sigma <= schedule.sigmas[-1]:
        return step
    return step._replace(x=step.x / np.float32(math.hypot(1, step.sigma)))


def _apart(request: Request, plan: Plan, network: Network, conditioning: Feeds, seeds: Sequence[int]) -> Iterator[Step]:
    """Where the sampler chooses its steps by what it sees, a batch would choose other ones than each sample alone.

    So each walks by itself, a step at a time; those that have arrived wait for the rest.
    """
    n = len(seeds)
    with contextlib.ExitStack() as stack:
        walks = []
        for i, seed in enumerate(seeds):
            feeds = {name: value[i::n] for name, value in conditioning.items()}  # its row, with guidance both of them
            alone = walk(replace(request, seed=seed, samples=1), plan, network, feeds)
            walks.append(stack.enter_context(contextlib.closing(alone)))
        steps, moved = [next(w) for w in walks], True
        while moved:
            yield Step(
                np.concatenate([s.x for s in steps]), np.concatenate([s.x0 for s in steps]), max(s.sigma for s in steps)
            )
            following = [next(w, None) for w in walks]
            steps = [new or old for new, old in zip(following, steps, strict=True)]
            moved = any(new is not None for new in following)
