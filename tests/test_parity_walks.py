"""Walks of a made-up network against diffusers' scheduler classes: what was trained how, from noise and from a picture."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="compares with diffusers, which needs torch (the export extra)")
import diffusers  # noqa: E402

from vega_edge.runtime.schedulers import Scheduler, all_schedulers  # noqa: E402
from vega_edge.runtime.strength import ending  # noqa: E402
from vega_edge.runtime.walk import _at_its_end, noised  # noqa: E402

from .fakes import VEGA, network  # noqa: E402

STEPS = 10
TRAININGS = [
    {"prediction_type": kind, "rescale_betas_zero_snr": zero}
    for kind, zero in (("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", True))
]
Array = NDArray[np.float32]
NO_SAMPLE = ("Euler a", "Heun", "DPM2 a", "DPM2 a Karras", "DPM2", "DPM2 Karras", "PNDM")  # diffusers lacks it there
ROWS = [row for row in all_schedulers() if row.family == "diffusers"]


def draws() -> Any:
    random = np.random.default_rng(3)
    return iter([random.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(STEPS + 2)])


def ours(row: Scheduler, config: dict[str, Any], strength: float | None) -> Array:
    model, noise = row.noise_model(config), draws()
    schedule = row.schedule(model, STEPS)
    kind = model.config["prediction_type"]

    def denoise(x: Array, sigma: float) -> Array:
        scale = math.hypot(1, sigma)
        seen = x / np.float32(scale)
        out = network(seen, schedule.timestep(sigma))
        if kind == "epsilon":
            return np.asarray(x - out * np.float32(sigma))
        return np.asarray(out if kind == "sample" else seen / np.float32(scale) - out * np.float32(sigma / scale))

    if strength is None:
        x = next(noise) * np.float32(schedule.scale)
    else:
        schedule = ending(schedule, row, model, STEPS, strength)
        x = noised(next(noise), next(noise), schedule)
    *_, last = row.sampler(denoise, x, schedule, lambda sigma, sigma_next: next(noise))
    return _at_its_end(last, schedule).x


def theirs(row: Scheduler, config: dict[str, Any], strength: float | None) -> Array:
    """As the pipelines run them: `get_timesteps` and `prepare_latents` of those that start from a picture."""
    scheduler, noise = getattr(diffusers, str(row.diffusers)).from_config(config, **row.forced), draws()
    scheduler.set_timesteps(STEPS)
    skipped = 0
    if strength is None:
        x = torch.from_numpy(next(noise)) * scheduler.init_noise_sigma
    else:
        skipped = (STEPS - int(STEPS * strength)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        picture, level = next(noise), scheduler.timesteps[skipped : skipped + 1]
        x = scheduler.add_noise(torch.from_numpy(picture), torch.from_numpy(next(noise)), level)
    options = {"eta": row.eta or 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(noise)), create=True):
        for t in scheduler.timesteps[skipped:]:
            out = torch.from_numpy(network(scheduler.scale_model_input(x, t).numpy(), np.float32(t)))
            x = scheduler.step(out, t, x, return_dict=False, **options)[0]
    return np.asarray(x.numpy())


@pytest.mark.parametrize("strength", [None, 0.4])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_walk_is_that_of_diffusers(row: Scheduler, strength: float | None) -> None:
    """LMS from a picture was 0.3 off, DDPM from noise at a terminal SNR of zero 1e-3."""
    diffusers.utils.logging.set_verbosity_error()
    for training in TRAININGS:
        for spacing in ("leading", "trailing"):
            config = {**VEGA, **training, "timestep_spacing": spacing}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # LMS: scipy's quadrature on float32
                try:
                    wanted = theirs(row, config, strength)
                except (NotImplementedError, ValueError):
                    assert row.name in NO_SAMPLE and training["prediction_type"] == "sample", row.name
                    continue
            error = np.abs(ours(row, config, strength) - wanted).max() / np.abs(wanted).max()
            assert error < 2e-4, (training, spacing)
