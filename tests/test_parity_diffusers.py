"""The same fake network and the same noise, through diffusers' schedulers and ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vega_edge.runtime.schedulers import SCHEDULERS

from . import fakes

torch = pytest.importorskip("torch", reason="compares with diffusers, which needs torch (the export extra)")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 8, 8)
STEPS = (1, 2, 4, 5, 10, 25, 61, 100)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Cells that the reference itself can't run, or where we differ on purpose.
EXCLUDED = {
    ("LCM", 61): "LCM has 50 original steps",
    ("LCM", 100): "LCM has 50 original steps",
}


def reference(
    name: str, config: dict[str, Any], steps: int, noise: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """diffusers' loop, as its pipelines run it; its random draws are taken from `noise`."""
    ours = SCHEDULERS[name]
    scheduler = getattr(diffusers, ours.diffusers).from_config(config, **ours.forced)
    draws = iter(noise)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(draws)))
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(next(draws)) * scheduler.init_noise_sigma
    timesteps = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        timesteps.append(float(t))
        out = torch.from_numpy(fakes.network(scaled.numpy(), np.float32(t)))
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy(), timesteps


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_latents_as_diffusers(
    name: str, prediction: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, steps) in EXCLUDED:
        pytest.skip(EXCLUDED[name, steps])
    if spacing == "trailing" and steps == 61:
        pytest.skip("diffusers' arange gives 62 steps, the last at timestep -1; ours gives 61")
    if prediction == "sample" and name in ("Euler a", "Euler"):
        pytest.skip("diffusers' Euler schedulers don't implement it")
    config = {**fakes.VEGA, "timestep_spacing": spacing, "prediction_type": prediction}
    rng = np.random.default_rng(steps)
    noise = [rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(steps + 2)]
    expected, timesteps = reference(name, config, steps, noise, monkeypatch)
    got = fakes.walk(SCHEDULERS[name], config, steps, noise)
    assert got.timesteps == pytest.approx(timesteps, abs=2e-3)
    assert relative(got.latents, expected) < 1e-4
