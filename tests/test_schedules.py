"""Properties that need no reference: grids, spacings, names, and what configs may say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vega_edge.errors import UsageError
from vega_edge.runtime import spacings
from vega_edge.runtime.noise_model import NoiseModel
from vega_edge.runtime.schedulers import (
    FAMILIES,
    SCHEDULES,
    Scheduler,
    all_schedulers,
    get_scheduler,
    scheduler_named_in,
)
from vega_edge.runtime.schedules import Schedule

from .fakes import VEGA

ROWS = all_schedulers()
IDS = [f"{row.family}/{row.name}" for row in ROWS]
SOME_STEPS = (1, 2, 3, 4, 7, 10, 25, 50, 61, 100, 103, 333, 499, 501, 750, 998, 999, 1000)

# Steps taken where others are than were asked for: the web UI's timesteps stand 1000 // n apart, and its DDIM and PLMS
# walk between them; DPM fast makes up to three model calls a step.
OTHER_TOTALS = {
    ("a1111", "DDIM"): {2: 1, 10: 9, 25: 24, 30: 30, 61: 62, 1000: 998},
    ("a1111", "PLMS"): {2: 1, 10: 9, 25: 24, 30: 30, 61: 62, 1000: 998},
    ("a1111", "UniPC"): {3: 4, 10: 10, 25: 25, 30: 31, 61: 63, 1000: 1000},
    ("a1111", "DPM fast"): {1: 1, 2: 1, 3: 2, 4: 2, 25: 9, 1000: 334},
}


@pytest.mark.parametrize(("family", "name"), OTHER_TOTALS)
def test_steps_taken_where_others_are_than_asked_for(family: str, name: str) -> None:
    row = get_scheduler(name, family)
    model = row.noise_model(VEGA)
    assert {n: row.schedule(model, n).total for n in OTHER_TOTALS[family, name]} == OTHER_TOTALS[family, name]


def test_spacing_follows_the_models_own_number_of_timesteps() -> None:
    row = get_scheduler("DDIM", "a1111")
    assert row.schedule(row.noise_model({**VEGA, "num_train_timesteps": 500}), 30).total == 31  # 500 // 30 = 16


def most(row: Scheduler) -> int:
    return 50 if row.name in ("LCM", "TCD") else 1000


def check(row: Scheduler, schedule: Schedule, n: int) -> None:
    """n + 1 falling levels, each but the last with a timestep of the network's."""
    assert len(schedule.sigmas) == len(schedule) + 1
    # Grids that end at timestep 0 end where set_alpha_to_one false lands too: a last step that goes nowhere, kept
    # because such a model's config asks for it.
    stands = row.name in ("DDIM", "PNDM") and schedule.timesteps[-1] == 0
    assert (np.diff(schedule.sigmas[:-1] if stands else schedule.sigmas) < 0).all(), n
    assert schedule.sigmas[-1] >= 0 and np.isfinite(schedule.sigmas).all()
    assert (schedule.timesteps >= 0).all() and (schedule.timesteps <= 999).all()
    assert (np.diff(schedule.timesteps) <= 0).all()
    if (row.family, row.name) not in OTHER_TOTALS and not row.adaptive:
        assert schedule.total == n


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_every_grid_falls_for_every_number_of_steps(row: Scheduler) -> None:
    model = row.noise_model(VEGA)
    for n in range(row.least_steps, most(row) + 1):
        check(row, row.schedule(model, n), n)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_every_named_schedule_falls_for_every_sampler(row: Scheduler) -> None:
    model = row.noise_model(VEGA)
    if not row.any_schedule:
        with pytest.raises(UsageError, match=f"^{row.name} makes its own schedule and can't use 'karras'$"):
            row.schedule(model, 10, "karras")
        return
    for named, n in itertools.product(SCHEDULES, SOME_STEPS):
        if n >= row.least_steps:
            schedule = row.schedule(model, n, named)
            assert len(schedule) == n and (np.diff(schedule.sigmas) < 0).all(), (named, n)
            assert schedule.scale > 0 and (schedule.orders is None or len(schedule.orders) == n)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("row", [r for r in ROWS if r.family == "diffusers"], ids=lambda r: r.name)
def test_every_timestep_spacing_falls(row: Scheduler, spacing: str) -> None:
    model = row.noise_model({**VEGA, "timestep_spacing": spacing})
    for n in SOME_STEPS:
        if n <= most(row):
            check(row, row.schedule(model, n), n)


def test_karras_starts_elsewhere_in_the_two_families() -> None:
    """diffusers spans what its leading timesteps span, the web UI the whole of training."""
    tops = {f: get_scheduler("DPM2 Karras", f).schedule(NoiseModel(_read(f)), 25).sigmas[0] for f in FAMILIES}
    assert tops == pytest.approx({"diffusers": 11.68, "a1111": 14.61}, abs=0.01)


def _read(family: str) -> dict[str, Any]:
    return dict(get_scheduler("DPM2 Karras", family).noise_model(VEGA).config)


def test_the_next_to_last_sigma_is_dropped_where_the_web_ui_drops_it() -> None:
    model = get_scheduler("DPM2", "a1111").noise_model(VEGA)
    for name, drops in (("DPM2", True), ("DPM2 a Karras", True), ("DPM++ 3M SDE Exponential", True), ("Heun", False)):
        last = get_scheduler(name, "a1111").schedule(model, 10).sigmas[-2]
        assert (last > 1.5 * model.sigmas[0]) == drops, name


def test_beta_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    q = np.concatenate((np.linspace(0, 1, 1001), [1e-12, 1e-6, 1 - 1e-6]))
    assert spacings.beta_quantile(q) == pytest.approx(stats.beta.ppf(q, 0.6, 0.6), rel=1e-12, abs=1e-15)


def test_spacings_stand_where_the_web_ui_puts_them() -> None:
    """`modules/sd_schedulers.py`: by hand, in timesteps."""
    model = get_scheduler("Euler", "a1111").noise_model(VEGA)

    def at(name: str, n: int) -> list[float]:
        return [float(t) for t in model.log_timestep(spacings.levels(name, model, n))]

    assert at("normal", 4) == pytest.approx([999, 666, 333, 0], abs=1e-4)
    assert at("sgm_uniform", 4) == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-4)
    assert at("simple", 7) == pytest.approx([999, 857, 714, 571, 428, 285, 142], abs=1e-4)
    levels = spacings.levels("exponential", model, 5)
    assert levels[1:] / levels[:-1] == pytest.approx([(model.sigmas[0] / model.sigmas[-1]) ** 0.25] * 4)


def test_align_your_steps_tables() -> None:
    """Ten steps are the published ones, the last level being zero; the web UI keeps that level, and interpolates."""
    model = get_scheduler("Euler", "a1111").noise_model(VEGA)
    sd15 = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    sdxl = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]
    assert spacings.levels("ays_sd15", model, 10) == pytest.approx(sd15[:10])
    assert spacings.levels("ays_sdxl", model, 20)[::2] == pytest.approx(sdxl[:10])
    assert spacings.levels("ays_sdxl", model, 20)[1] == pytest.approx((14.615 * 6.315) ** 0.5)
    assert spacings.levels("ays", model, 1) == pytest.approx([14.615])
    assert spacings.webui_levels("ays_sd15", model, 11) == pytest.approx(sd15)
    assert spacings.webui_levels("ays_sdxl", model, 21)[::2] == pytest.approx(sdxl)
    for family, last in (("diffusers", 0.152), ("a1111", 0.029)):
        schedule = get_scheduler("Euler", family).schedule(model, 10, "ays_sd15")
        assert schedule.sigmas[-2:] == pytest.approx([last, 0.0])


def test_every_named_schedule_falls_for_every_number_of_steps() -> None:
    model = get_scheduler("Euler", "a1111").noise_model(VEGA)
    for name in SCHEDULES:
        for n in range(1, 1001):
            for sigmas in (spacings.levels(name, model, n), spacings.webui_levels(name, model, n)):
                assert len(sigmas) == n and (np.diff(sigmas) < 0).all() and sigmas[-1] >= 0, (name, n)


def test_timesteps_between_the_grid_are_interpolated_in_log_sigma() -> None:
    schedule = get_scheduler("DPM Multi Karras").schedule(get_scheduler("DPM Multi Karras").noise_model(VEGA), 10)
    model = schedule.train_sigmas
    assert schedule.timestep(float(schedule.sigmas[3])) == schedule.timesteps[3] == round(schedule.timesteps[3])
    assert schedule.timestep(float(np.sqrt(model[500] * model[501]))) == pytest.approx(500.5, abs=1e-6)


def test_orders_of_the_last_steps() -> None:
    """Third-order solvers that end above zero, by `lower_order_final`: what diffusers' classes write in their steps."""
    config = {**VEGA, "solver_order": 3, "final_sigmas_type": "sigma_min"}

    def orders(name: str, n: int, lower: bool) -> tuple[int, ...] | None:
        row = get_scheduler(name)
        return row.schedule(row.noise_model({**config, "lower_order_final": lower}), n).orders

    assert orders("DPM Multi", 5, True) == (1, 2, 3, 2, 1)
    assert orders("DPM Multi", 14, True) == (1, 2, *[3] * 10, 2, 1)
    assert orders("DPM Multi", 15, True) == (1, 2, *[3] * 13)  # few enough are fewer than 15
    assert orders("DPM Multi", 5, False) == (1, 2, 3, 3, 3)
    assert orders("DPM Single", 5, True) == (1, 2, 3, 1, 2)  # only whole runs of three are cut
    assert orders("DPM Single", 6, True) == (1, 2, 3, 1, 2, 1)
    assert orders("DPM Single", 6, False) == (1, 2, 3, 1, 2, 3)
    assert orders("UniPC", 6, True) == (1, 2, 3, 3, 2, 1)


@pytest.mark.parametrize("name", ["DPM Multi", "DPM Single"])
def test_a_step_that_goes_nowhere_changes_nothing(name: str) -> None:
    """These levels end at the model's lowest, and `sigma_min` adds it once more; diffusers divides by its width."""
    row = get_scheduler(name)
    model = row.noise_model(
        {**VEGA, "solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": name != "DPM Multi", "use_beta_sigmas": True}
    )  # fmt: skip
    x = np.full((1, 1, 1, 1), 14.6, np.float32)
    *_, before, last = row.sampler(lambda x, s: x / (1 + s * s), x, row.schedule(model, 6), lambda a, b: 0 * x)
    assert before.sigma == last.sigma and last.x == pytest.approx(before.x, rel=1e-6)


def test_ddim_lands_on_timestep_zero_before_it_goes_to_one() -> None:
    """With `set_alpha_to_one` that is another level than the end: of steps to timestep 0 and below it."""
    row = get_scheduler("DDIM")
    model = row.noise_model({**VEGA, "steps_offset": 0, "set_alpha_to_one": True})
    schedule = row.schedule(model, 10)
    assert schedule.landings is not None
    assert schedule.landings[-2:].tolist() == [model.sigmas[0], 0.0]


# -- names ------------------------------------------------------------------------------------------------------------

SEGMIND = "DDIM, DPM Multi, DPM Single, Euler a, Euler, Heun, DPM2 a Karras, DPM2 Karras, LMS, PNDM, DDPM, UniPC"
DYNAVIS = (
    "DPM++ 2M Karras, DPM++ SDE Karras, DPM++ 2M SDE Exponential, DPM++ 2M SDE Karras, Euler a, Euler, LMS, Heun, DPM2, "
    "DPM2 a, DPM++ 2S a, DPM++ 2M, DPM++ SDE, DPM++ 2M SDE, DPM++ 2M SDE Heun, DPM++ 2M SDE Heun Karras, "
    "DPM++ 2M SDE Heun Exponential, DPM++ 3M SDE, DPM++ 3M SDE Karras, DPM++ 3M SDE Exponential, DPM fast, DPM adaptive, "
    "LMS Karras, DPM2 Karras, DPM2 a Karras, DPM++ 2S a Karras, Restart, DDIM, PLMS, UniPC"
)


@pytest.mark.parametrize(("family", "listed", "count"), [("diffusers", SEGMIND, 12), ("a1111", DYNAVIS, 30)])
def test_every_name_of_the_api_pages(family: str, listed: str, count: int) -> None:
    names = listed.split(", ")
    assert len(names) == count
    for name in (*names, "LCM", "TCD", "Euler Lightning"):
        row = get_scheduler(name, family)
        assert (row.name, row.family) == (name, family)


def test_no_two_rows_answer_to_one_name() -> None:
    assert len({(row.family, row.name) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert get_scheduler(row.name.upper().replace(" ", "_"), row.family) is row


@pytest.mark.parametrize(
    ("written", "name", "family"),
    [
        ("dpmpp_2m", "DPM++ 2M", "a1111"), ("dmpp_2m", "DPM++ 2M", "a1111"), ("dpmpp_sde_ancestral", "DPM++ SDE", "a1111"),
        ("euler_a", "Euler a", "diffusers"), ("euler_ancestral", "Euler a", "diffusers"), ("ddim", "DDIM", "diffusers"),
        ("k_dpmpp_2m_ka", "DPM++ 2M Karras", "a1111"), ("dpmpp_3m_sde_exp", "DPM++ 3M SDE Exponential", "a1111"),
        ("sample_dpm_2_ancestral", "DPM2 a", "diffusers"), ("k_dpm_ad", "DPM adaptive", "a1111"),
        ("DPMSolverMultistepScheduler", "DPM Multi", "diffusers"), ("UniPCMultistep", "UniPC", "diffusers"),
        ("EulerAncestralDiscreteScheduler", "Euler a", "diffusers"), ("KDPM2DiscreteScheduler", "DPM2", "diffusers"),
        ("euler trailing", "Euler Lightning", "diffusers"), (" PLMS ", "PLMS", "a1111"),
        ("dmpp_2m_karras", "DPM++ 2M Karras", "a1111"), ("dpmpp_sde_ancestral_karras", "DPM++ SDE Karras", "a1111"),
        ("DPMSolverSDEScheduler", "DPM++ SDE", "a1111"), ("EulerDiscreteScheduler", "Euler", "diffusers"),
    ],
)  # fmt: skip
def test_loose_spellings(written: str, name: str, family: str) -> None:
    row = get_scheduler(written)
    assert (row.name, row.family) == (name, family)


@pytest.mark.parametrize(
    ("written", "name", "family"),
    [
        ("EulerDiscreteScheduler", "Euler", "a1111"), ("EulerAncestralDiscrete", "Euler a", "a1111"),
        ("DDIMScheduler", "DDIM", "a1111"), ("LCMScheduler", "LCM", "a1111"), ("KDPM2Discrete", "DPM2", "a1111"),
        ("PNDMScheduler", "PNDM", "diffusers"), ("DPMSolverMultistep", "DPM Multi", "diffusers"),
    ],
)  # fmt: skip
def test_a_class_s_name_means_a_scheduler_of_the_family_like_any_other_spelling(
    written: str, name: str, family: str
) -> None:
    row = get_scheduler(written, "a1111")
    assert (row.name, row.family) == (name, family)


@pytest.mark.parametrize("written", sorted({str(row.diffusers) for row in ROWS if row.diffusers}))
def test_a_class_s_name_may_be_shortened(written: str) -> None:
    """Also to nothing that tells its family: KDPM2 is DPM2."""
    row = get_scheduler(written)
    short = written.removesuffix("Scheduler")
    for form in (short, short.removesuffix("Discrete"), short.lower(), written.replace("Discrete", "_discrete_")):
        assert get_scheduler(form) is row, form


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("euler_ancestral_discrete", "Euler a"), ("k_dpm_2_discrete", "DPM2"), ("k_dpm_2_ancestral_discrete", "DPM2 a"),
        ("lms_discrete", "LMS"), ("dpmsolver_multistep", "DPM Multi"), ("unipc_multistep", "UniPC"), ("heun_discrete", "Heun"),
    ],
)  # fmt: skip
def test_the_names_of_diffusers_files(file: str, name: str) -> None:
    assert get_scheduler(file).name == name


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"^unknown scheduler 'Eular'; did you mean 'Euler'\? there are: DDIM, DDPM, DPM ad"
    ):
        get_scheduler("Eular")
    with pytest.raises(UsageError, match=r"^unknown family 'comfy'; there are: a1111, diffusers$"):
        get_scheduler("Euler", "comfy")
    with pytest.raises(UsageError, match=r"^unknown schedule 'karas'; did you mean 'karras'\? there are: ays, "):
        get_scheduler("Euler").schedule(get_scheduler("Euler").noise_model(VEGA), 10, "karas")


def test_the_name_in_a_config() -> None:
    assert scheduler_named_in({"_class_name": "LCMScheduler"}) == "LCM"
    assert scheduler_named_in({"_class_name": "EulerDiscreteScheduler"}) == "Euler"
    assert scheduler_named_in({"_class_name": "DPMSolverMultistepScheduler"}) == "DPM Multi"
    with pytest.raises(UsageError, match=r"scheduler_config\.json names 'FooScheduler', which is not implemented"):
        scheduler_named_in({"_class_name": "FooScheduler"})


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("DPM Multi", {"thresholding": True}, "DPM Multi: thresholding True in scheduler_config.json is not supported; allowed: False, None"),
        ("DPM Multi", {"algorithm_type": "sde-dpmsolver++"}, "DPM Multi: algorithm_type 'sde-dpmsolver++' in scheduler_config.json is not supported; allowed: 'dpmsolver++', 'deis'"),
        ("PNDM", {"skip_prk_steps": False}, "PNDM: skip_prk_steps False in scheduler_config.json is not supported; allowed: True"),
        ("DDPM", {"variance_type": "learned"}, "DDPM: variance_type 'learned' in scheduler_config.json is not supported; allowed: 'fixed_small', 'fixed_small_log'"),
        ("UniPC", {"predict_x0": False}, "UniPC: predict_x0 False in scheduler_config.json is not supported; allowed: True"),
        ("Euler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported; use linear or scaled_linear"),
        ("Euler", {"timestep_spacing": "even"}, "Euler: timestep_spacing 'even' in scheduler_config.json is not supported; allowed: 'leading', 'trailing', 'linspace'"),
        ("Euler", {"prediction_type": "flow"}, "Euler: prediction_type 'flow' in scheduler_config.json is not supported; allowed: 'epsilon', 'v_prediction', 'sample'"),
    ],
)  # fmt: skip
def test_options_that_are_not_implemented_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        get_scheduler(name).schedule(get_scheduler(name).noise_model({**VEGA, **change}), 10)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_a_file_silent_on_clipping_wants_none(name: str) -> None:
    """Its class would clip latents; files for latents that name it say that it should not, those of others nothing."""
    silent = {k: v for k, v in VEGA.items() if k != "clip_sample"}
    assert "clip_sample" not in get_scheduler(name).noise_model(silent).config
    with pytest.raises(UsageError) as error:
        get_scheduler(name).noise_model({**silent, "clip_sample": True})
    assert str(error.value) == (
        f"{name}: clip_sample True in scheduler_config.json is not supported; allowed: False, None"
    )


@pytest.mark.parametrize(
    ("name", "family", "steps", "message"),
    [
        ("Euler", "diffusers", 0, "Euler takes 1 to 1000 steps, got 0"),
        ("Euler", "diffusers", 1001, "Euler takes 1 to 1000 steps, got 1001"),
        ("DDIM", "a1111", 1, "DDIM takes 2 to 1000 steps, got 1"),
        ("PLMS", "a1111", 1, "PLMS takes 2 to 1000 steps, got 1"),
        ("UniPC", "a1111", 2, "UniPC takes 3 to 1000 steps, got 2"),
        ("LCM", "diffusers", 51, "this model was distilled on 50 steps and can't take 51; allowed: 1 to 50"),
    ],
)
def test_steps_that_a_sampler_cannot_take(name: str, family: str, steps: int, message: str) -> None:
    row = get_scheduler(name, family)
    with pytest.raises(UsageError) as error:
        row.schedule(row.noise_model(VEGA), steps)
    assert str(error.value) == message


def test_eta() -> None:
    assert get_scheduler("DDIM").eta == 0 and not get_scheduler("DDIM").stochastic
    assert get_scheduler("DDIM").with_eta(0.5).stochastic and get_scheduler("TCD").eta == 0.3
    assert not get_scheduler("Euler a").with_eta(0).stochastic and get_scheduler("LCM").stochastic
    with pytest.raises(UsageError, match=r"^Euler has no eta$"):
        get_scheduler("Euler").with_eta(0.5)
    for eta in (-0.1, 1.5, True, "half", float("nan")):
        with pytest.raises(UsageError, match=r"^eta must be a number from 0 to 1, got "):
            get_scheduler("DDIM").with_eta(eta)  # type: ignore[arg-type]
