"""Properties of every sampler on every schedule that need no reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from vega_edge.runtime.denoiser import Denoiser
from vega_edge.runtime.samplers import Step
from vega_edge.runtime.schedulers import SCHEDULES, Scheduler, all_schedulers, get_scheduler
from vega_edge.runtime.schedules import Schedule

from .fakes import VEGA, NetworkEngine

ROWS = all_schedulers()
IDS = [f"{row.family}/{row.name}" for row in ROWS]
SHAPE = (1, 4, 4, 4)


def rows_and_schedules() -> Iterator[tuple[Scheduler, str | None]]:
    for row in ROWS:
        yield row, None
        if row.any_schedule:
            yield from ((row, named) for named in SCHEDULES)


@pytest.mark.parametrize(
    ("row", "alpha_one"),
    [(row, True) for row in ROWS] + [(row, False) for row in ROWS if "set_alpha_to_one" in row.defaults],
    ids=[*IDS, "diffusers/DDIM, above zero", "diffusers/PNDM, above zero"],
)
def test_a_perfect_denoiser_is_reproduced(row: Scheduler, alpha_one: bool) -> None:
    """Up to the schedule's final sigma, in any number of steps, on any schedule."""
    model = row.noise_model({**VEGA, "set_alpha_to_one": alpha_one})
    for (_, named), steps in itertools.product([r for r in rows_and_schedules() if r[0] is row], (1, 2, 3, 7, 25, 40)):
        if steps < row.least_steps:
            continue
        schedule = row.schedule(model, steps, named)
        rng = np.random.default_rng(0)
        truth, start = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
        walk = row.sampler(
            lambda x, sigma, truth=truth: truth, truth + np.float32(schedule.sigmas[0]) * start, schedule,  # type: ignore[misc]
            lambda sigma, sigma_next, rng=rng: rng.standard_normal(SHAPE, dtype=np.float32),  # type: ignore[misc]
        )  # fmt: skip
        *_, last = walk
        # LCM's boundary condition makes x itself the answer at timestep 0, whose sigma the named schedules begin to end at
        end = schedule.sigmas[-2] if row.name == "LCM" else schedule.sigmas[-1]
        assert last.x.dtype == np.float32 and last.sigma == schedule.sigmas[-1]
        assert alpha_one or named or last.sigma == model.sigmas[0]
        assert np.abs(last.x - truth).max() < 5e-4 + 5 * min(end, 0.04), (named, steps)


# Of convergence, with eta 0, in the middle of the walk: steps to zero are of first order for all. With many steps what
# the first ones leave, of lower order, is the most of the error: so LMS, PNDM, PLMS and DPM++ 3M SDE are of order 2.
ORDERS = {
    "Euler": 1, "Euler a": 1, "Euler Lightning": 1, "DDIM": 1, "TCD": 1, "Heun": 2, "DPM2": 2, "DPM2 a": 2,
    "DPM Multi": 2, "DPM Single": 2, "DPM++ 2M": 2, "DPM++ 2S a": 2, "DPM++ SDE": 2, "DPM++ 2M SDE": 2,
    "DPM++ 2M SDE Heun": 2, "DPM++ 3M SDE": 2, "LMS": 2, "PNDM": 2, "PLMS": 2, "DPM fast": 3, "UniPC": 3,
}  # fmt: skip
NO_ORDER = {"DDPM", "LCM", "Restart", "DPM adaptive"}  # no ODE's, or with steps of its own choice


def plain(row: Scheduler) -> str:
    return row.name.removesuffix(" Karras").removesuffix(" Exponential")


def error_halfway(row: Scheduler, steps: int) -> float:
    """For data ~ N(0, 1) the best denoiser is x / (1 + sigma^2), and the exact path goes as sqrt(1 + sigma^2)."""
    model = row.noise_model({**VEGA, "timestep_spacing": "trailing"})
    named = "normal" if row.any_schedule and row.name != "TCD" else None
    schedule = row.schedule(model, steps, named)
    x = np.full((1, 1, 1, 1), np.hypot(1, schedule.sigmas[0]))
    done = list(row.sampler(lambda x, s: x / (1 + s * s), x, schedule, lambda a, b: np.zeros_like(x)))
    step = done[len(done) // 2]
    return abs(float(step.x.item()) / np.hypot(1, step.sigma) - 1)


@pytest.mark.parametrize("row", [r for r in ROWS if plain(r) not in NO_ORDER], ids=lambda r: f"{r.family}/{r.name}")
def test_order_of_convergence_on_gaussian_data(row: Scheduler) -> None:
    steps = 25 if row.name == "TCD" else 192  # TCD takes 50 at most
    still = row if row.eta is None else row.with_eta(0)
    measured = np.log2(error_halfway(still, steps) / error_halfway(still, 2 * steps))
    assert row.order == ORDERS[plain(row)] == pytest.approx(measured, abs=0.25)


def test_no_row_is_missing_from_the_orders() -> None:
    assert {plain(row) for row in ROWS} == set(ORDERS) | NO_ORDER


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_model_calls_a_step_are_what_the_table_says(row: Scheduler) -> None:
    model, calls = row.noise_model(VEGA), []
    schedule = row.schedule(model, 48)
    shape = (1, 1, 1, 1)
    x = np.ones(shape, np.float32) * np.float32(schedule.sigmas[0])
    done = list(row.sampler(lambda x, s: (calls.append(s), x / (1 + s * s))[1], x, schedule, lambda a, b: 0 * x))
    assert row.adaptive or schedule.total == len(done)
    if row.calls is None:
        assert row.name in ("DPM fast", "DPM adaptive")
    else:
        assert len(calls) / len(done) == pytest.approx(row.calls, abs=0.05)


@pytest.mark.parametrize(("t", "skip", "out"), [(0, 1.0, 0.0), (1, 0.0024937656, 0.9987523388)])
def test_a_consistency_model_begins_as_the_identity(t: int, skip: float, out: float) -> None:
    """Its boundary condition (arXiv:2310.04378, equation 9), on x in the network's form; sigma_data 1/2, t times 10."""
    row = get_scheduler("LCM")
    train = row.noise_model(VEGA).sigmas
    x = np.random.default_rng(4).standard_normal(SHAPE, dtype=np.float32)
    schedule = Schedule(np.array([train[t], 0.0]), np.array([float(t)]), 1.0, train)
    (step,) = row.sampler(lambda x, sigma: 5 + x, x, schedule, lambda a, b: x)
    assert step.x == pytest.approx(x * skip / np.hypot(1, train[t]) + (5 + x) * out, rel=1e-5, abs=1e-6)


# -- generators without state -----------------------------------------------------------------------------------------


def start(row: Scheduler, named: str | None, steps: int = 6, seed: int = 1) -> Iterator[Step]:
    rng = np.random.default_rng(seed)
    model = row.noise_model(VEGA)
    schedule = row.schedule(model, steps, named)
    denoise = Denoiser(NetworkEngine(), schedule, {}, 0.0, "epsilon")
    x = rng.standard_normal(SHAPE, dtype=np.float32) * np.float32(schedule.scale)
    return row.sampler(denoise, x, schedule, lambda a, b: rng.standard_normal(SHAPE, dtype=np.float32))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_interleaved_runs_equal_separate_ones_and_stopping_changes_nothing(row: Scheduler) -> None:
    for named in (None, *(SCHEDULES if row.any_schedule else ())):
        alone = [[step.x.copy() for step in start(row, named, seed=seed)] for seed in (1, 2)]
        stopped = [step.x for step in itertools.islice(start(row, named), 2)]
        together = itertools.zip_longest(start(row, named), start(row, named, seed=2))  # DPM adaptive's: of two lengths
        for walked, expected in zip(zip(*together, strict=True), alone, strict=True):
            got = [step.x for step in walked if step]
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(stopped, alone[0][:2], strict=True))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_what_went_in_or_came_out_is_not_written_to(row: Scheduler) -> None:
    """Buffers stay inside: steps kept from a walk are as they were, and so are its noise, its x and the x0s."""
    rng = np.random.default_rng(3)
    schedule = row.schedule(row.noise_model(VEGA), 24)
    engine = NetworkEngine()
    inner = Denoiser(engine, schedule, {}, 0.0, "epsilon")
    held: list[tuple[np.ndarray, np.ndarray]] = []

    def hold(a: np.ndarray) -> np.ndarray:
        held.append((a, a.copy()))
        return a

    lcm = row.name == "LCM"  # makes its own x0 of the denoiser's, which it may not write to either
    walk = row.sampler(
        lambda x, sigma: hold(inner(x, sigma)), hold(rng.standard_normal(SHAPE, dtype=np.float32)), schedule,
        lambda a, b: hold(rng.standard_normal(SHAPE, dtype=np.float32)),
    )  # fmt: skip
    for step in walk:
        hold(step.x)
        if not lcm:
            assert any(step.x0 is a for a, _ in held)
        hold(step.x0)
    assert all(np.array_equal(a, before) for a, before in held)


@pytest.mark.parametrize("row", [r for r in ROWS if r.stochastic], ids=lambda r: f"{r.family}/{r.name}")
def test_noise_is_asked_for_between_two_levels_of_the_walk(row: Scheduler) -> None:
    """What a Brownian path needs: both above zero, inside the schedule; and it is asked for only where it counts."""
    schedule = row.schedule(row.noise_model(VEGA), 24)
    low, high = schedule.sigmas[schedule.sigmas > 0].min(), schedule.sigmas.max()
    asked: list[tuple[float, float]] = []

    def noise(a: float, b: float) -> np.ndarray:
        asked.append((a, b))
        return np.zeros(SHAPE, np.float32)

    list(row.sampler(lambda x, s: x / np.float32(1 + s * s), np.ones(SHAPE, np.float32), schedule, noise))
    a_bit = 3e-7  # DPM++ SDE's levels have been to their float32 logarithms and back
    assert asked and all(low * (1 - a_bit) <= min(pair) < max(pair) <= high * (1 + a_bit) for pair in asked)
    if row.eta is not None:
        asked.clear()
        still = row.with_eta(0)
        list(still.sampler(lambda x, s: x / np.float32(1 + s * s), np.ones(SHAPE, np.float32), schedule, noise))
        assert not asked


@pytest.mark.parametrize("name", ["DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE"])
def test_intervals_of_the_brownian_path(name: str) -> None:
    """As k-diffusion asks for them: the single-step sampler first as far as the middle, in log sigma."""
    row = get_scheduler(name)
    schedule = row.schedule(row.noise_model(VEGA), 5)
    asked, expected = [], []
    for sigma, sigma_next in list(schedule.intervals())[:-1]:
        expected += [(sigma, (sigma * sigma_next) ** 0.5)] if name == "DPM++ SDE" else []
        expected.append((sigma, sigma_next))
    x = np.ones(SHAPE, np.float32)
    list(row.sampler(lambda x, s: 0 * x, x, schedule, lambda a, b: (asked.append((a, b)), x)[1]))
    assert np.array(asked) == pytest.approx(np.array(expected), rel=3e-7)  # of float32 logarithms
    assert row.brownian is not None and row.brownian(schedule) == asked  # exactly, so that each is drawn ahead


def test_only_the_sde_samplers_want_a_brownian_path() -> None:
    assert {row.name for row in ROWS if row.brownian} == {row.name for row in ROWS if "SDE" in row.name}
    assert get_scheduler("DPM++ SDE Karras").stochastic
