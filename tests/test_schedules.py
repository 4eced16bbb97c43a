"""Properties that need no reference: grids, perfect denoisers, orders of convergence, generators without state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_edge.errors import UsageError
from vega_edge.runtime.denoiser import Denoiser
from vega_edge.runtime.schedulers import SCHEDULERS, get_scheduler, scheduler_named_in

from .fakes import VEGA, NetworkEngine

SPACINGS = ("leading", "trailing", "linspace")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCHEDULERS)), st.sampled_from(SPACINGS), st.integers(1, 998))
def test_every_grid_falls_and_has_n_steps(name: str, spacing: str, n: int) -> None:
    n = min(n, 50) if name == "LCM" else n
    schedule = SCHEDULERS[name].schedule({**VEGA, "timestep_spacing": spacing}, n)
    assert len(schedule) == n and len(schedule.sigmas) == n + 1
    # Some grids end at timestep 0, which is where diffusers' DDIM lands too (set_alpha_to_one false): a last step that
    # goes nowhere, kept because such a model's config asks for it.
    stands = name == "DDIM" and schedule.timesteps[-1] == 0
    falls = np.diff(schedule.sigmas[:-1] if stands else schedule.sigmas)
    assert (falls < 0).all() and schedule.sigmas[-1] >= 0
    assert (schedule.timesteps >= 0).all() and (schedule.timesteps <= 999).all()


@pytest.mark.parametrize("n", [61, 103, 123])
def test_trailing_never_has_a_step_too_many(n: int) -> None:
    assert len(SCHEDULERS["Euler"].schedule({**VEGA, "timestep_spacing": "trailing"}, n)) == n


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_denoiser_is_reproduced(name: str, spacing: str, steps: int) -> None:
    scheduler = SCHEDULERS[name]
    schedule = scheduler.schedule({**VEGA, "timestep_spacing": spacing, "set_alpha_to_one": True}, steps)
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((1, 4, 8, 8), dtype=np.float32)
    x = truth + np.float32(schedule.sigmas[0]) * rng.standard_normal(truth.shape, dtype=np.float32)
    *_, last = scheduler.sampler(
        lambda x, sigma: truth, x, schedule, lambda: rng.standard_normal(truth.shape, dtype=np.float32)
    )
    assert last.x == pytest.approx(truth, abs=1e-4 + 5 * schedule.sigmas[-1])  # some end above zero


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("DDIM", 1), ("DPM Multi", 2)])
def test_order_of_convergence_on_gaussian_data(name: str, order: int) -> None:
    """For data ~ N(0, 1) the best denoiser is x / (1 + sigma^2), and the exact path goes as sqrt(1 + sigma^2)."""
    scheduler = get_scheduler(name)
    errors = []
    for steps in (40, 80):
        schedule = scheduler.schedule({**VEGA, "timestep_spacing": "trailing", "set_alpha_to_one": True}, steps)
        x = np.full((1, 1, 1, 1), np.hypot(1, schedule.sigmas[0]), np.float64)
        walk = scheduler.sampler(lambda x, s: x / (1 + s * s), x, schedule, lambda: np.zeros(1))
        # compared above the last step, which is first order for every sampler
        step, sigma = [(s.x, t) for s, t in zip(walk, schedule.sigmas[1:], strict=True)][-1 - steps // 4]
        errors.append(abs(float(step.item()) - np.hypot(1, sigma)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_interleaved_runs_equal_separate_ones(name: str) -> None:
    def run() -> Any:
        scheduler, rng = SCHEDULERS[name], np.random.default_rng(1)
        schedule = scheduler.schedule(VEGA, 6)
        denoise = Denoiser(NetworkEngine(), schedule, {}, 0.0, "epsilon")
        x = rng.standard_normal((1, 4, 8, 8), dtype=np.float32) * np.float32(schedule.scale)
        return scheduler.sampler(denoise, x, schedule, lambda: rng.standard_normal(x.shape, dtype=np.float32))

    alone = [step.x for step in run()]
    first, second = run(), run()
    for a, b, expected in zip(first, second, alone, strict=True):
        assert np.array_equal(a.x, expected) and np.array_equal(b.x, expected)


def test_names_of_schedulers() -> None:
    assert get_scheduler("euler A").name == "Euler a"
    with pytest.raises(UsageError) as error:
        get_scheduler("Eular")
    assert (
        str(error.value)
        == "unknown scheduler 'Eular'; did you mean 'Euler'? there are: DDIM, DPM Multi, DPM Multi Karras, Euler, Euler a, LCM"
    )
    assert scheduler_named_in({"_class_name": "LCMScheduler"}) == "LCM"
    with pytest.raises(UsageError, match=r"scheduler_config\.json names 'FooScheduler', which is not implemented"):
        scheduler_named_in({"_class_name": "FooScheduler"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholding": True}, "DPM Multi: thresholding True in scheduler_config.json is not supported; allowed: False, None"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported; use linear or scaled_linear"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even' is not known; use leading, trailing or linspace"),
    ],
)  # fmt: skip
def test_options_that_are_not_implemented_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        get_scheduler("DPM Multi").schedule({**VEGA, **change}, 10)
    assert str(error.value) == message


def test_lcm_takes_no_more_than_its_original_steps() -> None:
    with pytest.raises(UsageError) as error:
        get_scheduler("LCM").schedule(VEGA, 51)
    assert str(error.value) == "LCM was distilled on 50 steps and can't take 51; allowed: 1 to 50"
