"""What is asked, checked, and what is written about it into a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vega_edge.errors import UsageError
from vega_edge.runtime.request import Limits, Request, make_request
from vega_edge.runtime.rng import MAX_SEED

DEFAULTS = {"scheduler": "Euler", "steps": 25, "guidance": 7.5, "width": 128, "height": 64}
LIMITS = Limits((1, 50), (0, 20), (64, 256), 32)


def request(defaults: dict[str, Any] | None = None, **options: Any) -> Request:
    return make_request({"prompt": "a star", "seed": 7, **options}, {**DEFAULTS, **(defaults or {})}, LIMITS)


def facts(**options: Any) -> str:
    return request(**options).parameters("demo", "1.2").splitlines()[-1]


def test_nothing_new_is_written_about_what_is_as_always() -> None:
    assert (
        facts()
        == "Steps: 25, Sampler: Euler, CFG scale: 7.5, Seed: 7, Size: 128x64, Model: demo, Version: vega-edge 1.2"
    )


@pytest.mark.parametrize(("options", "written"), [
    ({"schedule": "karras"}, "Sampler: Euler, Schedule type: Karras, CFG scale"),
    ({"schedule": "sgm uniform"}, "Sampler: Euler, Schedule type: SGM Uniform, CFG scale"),
    ({"schedule": "Align Your Steps"}, "Sampler: Euler, Schedule type: Align Your Steps, CFG scale"),
    ({"rng": "nv"}, "Model: demo, RNG: NV, Version"),
    ({"rng": "NV"}, "Model: demo, RNG: NV, Version"),
    ({"family": "A1111"}, "Model: demo, Family: a1111, Version"),
    ({"scheduler": "euler_a", "eta": 0.5}, "Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 128x64, Model: demo, Eta: 0.5, Version"),
    ({"scheduler": "DDIM", "eta": 1}, "Model: demo, Eta DDIM: 1, Version"),
    ({"guidance_rescale": 0.7}, "Model: demo, CFG Rescale: 0.7, Version"),
    ({"noise_dtype": "fp16"}, "Model: demo, Noise dtype: fp16, Version"),
    ({"family": "a1111"}, "Model: demo, Family: a1111, Version"),
    ({"long_prompt": True}, "Model: demo, Long prompt: True, Version"),
    ({"scheduler": "dpmpp_2m_sde"}, "Steps: 25, Sampler: DPM++ 2M SDE, CFG scale"),
])  # fmt: skip
def test_what_differs_is_written(options: dict[str, Any], written: str) -> None:
    assert written in facts(**options)


def test_the_recipe_s_family_and_the_one_asked_for() -> None:
    recipe = {"family": "a1111"}
    assert request(defaults=recipe).family == "a1111"
    assert request(defaults=recipe, family="diffusers").family == "diffusers"
    assert request().family == "diffusers"
    assert request(scheduler="DPM Multi", defaults=recipe).family == "diffusers"  # the only one that has it


def test_a_models_schedule_is_kept_with_its_own_scheduler() -> None:
    recipe = {"family": "a1111", "scheduler": "DPM++ SDE", "schedule": "sgm_uniform"}
    assert request(defaults=recipe).schedule == "sgm_uniform"
    assert request(defaults=recipe, scheduler="dpmpp_sde").schedule == "sgm_uniform"
    assert request(defaults=recipe, scheduler="DPM++ SDE", schedule="karras").schedule == "karras"
    assert request(defaults=recipe, scheduler="Euler").schedule is None
    assert request(defaults={**recipe, "scheduler": "Euler"}, scheduler="Euler", family="diffusers").schedule is None


def test_numpys_numbers_are_numbers() -> None:
    asked = request(guidance=np.float32(3), scheduler="Euler a", eta=np.float64(0.5))
    assert (asked.guidance, asked.eta) == (3.0, 0.5)


def test_seeds() -> None:
    assert request(seed=5, samples=3).seeds == [5, 6, 7]
    assert request(seed=MAX_SEED).seed == 999_999_999_999_999
    assert request(seed=MAX_SEED - 2, samples=3).seeds[-1] == MAX_SEED
    with pytest.raises(
        UsageError,
        match=r"^seed, the first of 3, must be a whole number from -1 to 999999999999997, got 999999999999998$",
    ):
        request(seed=MAX_SEED - 1, samples=3)
    picked = {request(seed=-1).seed for _ in range(5)}
    assert len(picked) > 1 and min(picked) >= 0
    some = request(seed=-1)
    assert f"Seed: {some.seed}," in some.parameters("demo", "1.2")


@pytest.mark.parametrize(("options", "message"), [
    ({"family": "comfy"}, "unknown family 'comfy'; there are: a1111, diffusers"),
    ({"family": 3}, "family must be text, got int"),
    ({"schedule": "karas"}, "unknown schedule 'karas'; did you mean 'karras'? there are: "),
    ({"schedule": ""}, "unknown schedule ''; there are: "),
    ({"schedule": ["karras"]}, "schedule must be text, got list"),
    ({"rng": "cuda"}, "unknown rng 'cuda'; there are: nv, torch"),
    ({"noise_dtype": "fp8"}, "unknown noise dtype 'fp8'; there are: fp16, fp32"),
    ({"guidance_rescale": 1.5}, "guidance rescale must be a number from 0 to 1, got 1.5"),
    ({"guidance_rescale": "much"}, "guidance rescale must be a number from 0 to 1, got 'much'"),
    ({"eta": 0.5}, "Euler has no eta"),
    ({"scheduler": "Euler a", "eta": 1.5}, "eta must be a number from 0 to 1, got 1.5"),
    ({"scheduler": "Euler a", "eta": -0.1}, "eta must be a number from 0 to 1, got -0.1"),
    ({"scheduler": "Euler a", "eta": float("nan")}, "eta must be a number from 0 to 1, got nan"),
    ({"scheduler": "Euler a", "eta": "all"}, "eta must be a number from 0 to 1, got 'all'"),
    ({"scheduler": "Eulr"}, "unknown scheduler 'Eulr'; did you mean 'Euler'? there are: "),
    ({"scheduler": "Euler Karras"}, "unknown scheduler 'Euler Karras'; say scheduler 'Euler' and schedule 'karras'"),
    ({"scheduler": "k_euler_a_karras"}, "unknown scheduler 'k_euler_a_karras'; say scheduler 'Euler a' and schedule 'karras'"),
    ({"scheduler": "Heun sgm uniform"}, "unknown scheduler 'Heun sgm uniform'; say scheduler 'Heun' and schedule 'sgm_uniform'"),
    ({"scheduler": "Restart Karras"}, "unknown scheduler 'Restart Karras'; did you mean 'Restart'? there are: "),
    ({"scheduler": "UniPC", "family": "a1111", "steps": 2}, "UniPC takes 3 to 50 steps, got 2"),
    ({"steps": 0}, "steps must be a whole number from 1 to 50, got 0"),
    ({"colour": "red"}, "unknown option 'colour'; there are: eta, family, guidance, guidance_rescale, height, image, long_prompt, negative, noise_dtype, prompt, prompt_syntax, rng, samples, schedule, scheduler, seed, steps, strength, width"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        request(**options)
    got = str(error.value)
    assert got.startswith(message) if message.endswith(": ") else got == message
