"""Walks that start from a picture: which steps they take, against diffusers' schedulers started where its pipelines
start them.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest

from vega_edge.errors import UsageError
from vega_edge.runtime.denoiser import Denoiser
from vega_edge.runtime.schedulers import Scheduler, all_schedulers, get_scheduler
from vega_edge.runtime.strength import ending
from vega_edge.runtime.walk import noised

from . import fakes

SHAPE = (1, 4, 8, 8)
# diffusers' LMS takes the weights of a fourth-order step though it has one slope to weigh: what lacks is left out, and
# the first steps go too far. Ours rises from order 1 there, as at the start of a whole walk.
ROWS = [row for row in all_schedulers() if row.family == "diffusers" and row.name != "LMS"]
CELLS = [(10, 0.6), (10, 0.95), (7, 0.5), (4, 0.3), (5, 1.0)]


def noises() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.standard_normal(SHAPE, dtype=np.float32) for _ in range(40)]


def ours(row: Scheduler, steps: int, strength: float) -> np.ndarray:
    model = row.noise_model(fakes.VEGA)
    schedule = ending(row.schedule(model, steps), row, model, steps, strength)
    denoise = Denoiser(fakes.NetworkEngine(), schedule, {}, 0.0, model.config["prediction_type"])
    picture, *draws = noises()
    drawn = iter(draws)
    x = picture + next(drawn) * np.float32(schedule.sigmas[0])
    for step in row.sampler(denoise, x, schedule, lambda sigma, sigma_next: next(drawn)):
        last = step
    return last.x / np.float32(np.hypot(1, 0 if schedule.sigma_units else last.sigma))


def theirs(row: Scheduler, steps: int, strength: float) -> np.ndarray:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    scheduler = getattr(diffusers, str(row.diffusers)).from_config(fakes.VEGA, **row.forced)
    picture, *draws = (torch.from_numpy(n) for n in noises())
    drawn = iter(draws)
    module = sys.modules[type(scheduler).__module__]
    draw = mock.patch.object(module, "randn_tensor", lambda *a, **k: next(drawn), create=True)
    with draw, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(steps)
        begin = max(steps - min(int(steps * strength), steps), 0) * scheduler.order  # its pipelines' get_timesteps
        timesteps = scheduler.timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(picture, next(drawn), timesteps[:1])
        for t in timesteps:
            scaled = scheduler.scale_model_input(x, t)
            out = torch.from_numpy(fakes.network(scaled.numpy(), np.float32(t)))
            x = scheduler.step(out, t, x).prev_sample
    return np.asarray(x.numpy())


@pytest.mark.parametrize(("steps", "strength"), CELLS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_same_steps_as_diffusers(row: Scheduler, steps: int, strength: float) -> None:
    expected = theirs(row, steps, strength)
    got = ours(row, steps, strength)
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_the_web_ui_takes_one_step_more() -> None:
    def taken(name: str, steps: int, strength: float, family: str = "a1111") -> int:
        row = get_scheduler(name, family)
        model = row.noise_model(fakes.VEGA)
        return len(ending(row.schedule(model, steps), row, model, steps, strength))

    assert taken("Euler", 20, 0.5, "diffusers") == 10  # its pipelines' get_timesteps
    assert [taken("DPM++ 2M Karras", 20, s) for s in (0.0, 0.5, 0.75, 1.0)] == [1, 11, 16, 20]
    assert [taken("DDIM", 20, s) for s in (0.5, 1.0)] == [9, 18]


@pytest.mark.parametrize("name", ["DDIM", "PLMS", "UniPC"])
def test_every_strength_of_every_number_of_steps_has_its_ending(name: str) -> None:
    row = get_scheduler(name, "a1111")
    model = row.noise_model(fakes.VEGA)
    for steps in (3, 7, 61, 499, 501, 999, 1000):
        for strength in (0.7, 1.0):
            schedule = ending(row.schedule(model, steps), row, model, steps, strength)
            assert schedule.noised_at is not None and schedule.noised_at >= schedule.sigmas[0]


@pytest.mark.parametrize("name", ["DDIM", "PLMS", "UniPC"])
def test_the_web_ui_noises_to_the_timestep_above_the_one_it_begins_at(name: str) -> None:
    """Its `modules/sd_samplers_timesteps.py`: of 20 steps at strength 0.5 the ten lowest timesteps, 451 to 1, and the
    picture is noised as at 501. UniPC goes from 451 to 0 in as many steps as those are."""
    row = get_scheduler(name, "a1111")
    model = row.noise_model(fakes.VEGA)
    schedule = ending(row.schedule(model, 20), row, model, 20, 0.5)
    picture, noise = noises()[:2]
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    wanted = np.sqrt(abar[501]) * picture + np.sqrt(1 - abar[501]) * noise
    assert np.abs(noised(picture, noise, schedule) / np.hypot(1, schedule.sigmas[0]) - wanted).max() < 1e-5
    walked = np.linspace(451, 0, 11)[:-1] if name == "UniPC" else np.arange(451, 1, -50)
    assert schedule.timesteps.tolist() == pytest.approx(walked.tolist())
    end = abar[0 if name == "UniPC" else 1]
    assert schedule.sigmas[-1] == pytest.approx(np.sqrt(1 / end - 1), rel=1e-4)
    assert schedule.sigmas[0] == pytest.approx(np.sqrt(1 / abar[451] - 1), rel=1e-5)


def test_a_brownian_path_spans_the_whole_schedule_as_in_the_web_ui() -> None:
    row = get_scheduler("DPM++ 2M SDE Karras", "a1111")
    model = row.noise_model(fakes.VEGA)
    whole = row.schedule(model, 20)
    end = ending(whole, row, model, 20, 0.5)
    assert end.sigmas[0] < whole.sigmas[0] and end.levels_span == whole.levels_span
    assert whole.levels_span == (float(whole.sigmas[-2]), float(whole.sigmas[0]))


@pytest.mark.parametrize(
    ("name", "family", "steps", "strength", "message"),
    [
        (
            "Euler",
            "diffusers",
            4,
            0.2,
            "strength 0.2 of 4 steps is not one step; the least is 0.25, or take more steps",
        ),
        ("DPM adaptive", "a1111", 4, 0.5, "DPM adaptive chooses its own noise levels and can't start from a picture"),
    ],
)
def test_what_cannot_be_walked(name: str, family: str, steps: int, strength: float, message: str) -> None:
    row = get_scheduler(name, family)
    model: Any = row.noise_model(fakes.VEGA)
    with pytest.raises(UsageError) as error:
        ending(row.schedule(model, steps), row, model, steps, strength)
    assert str(error.value) == message
