"""abar by training timestep: the bits of the references', each with the betas it computes them from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vega_edge.runtime.noise_model import NoiseModel
from vega_edge.runtime.schedulers import get_scheduler

from .fakes import VEGA

LINEAR = {**VEGA, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
ZERO_SNR = {**VEGA, "rescale_betas_zero_snr": True}


def model(config: dict[str, Any], family: str = "diffusers") -> NoiseModel:
    return get_scheduler("Euler", family).noise_model(config)


@pytest.mark.parametrize("config", [VEGA, LINEAR], ids=["scaled_linear", "linear"])
def test_diffusers_bits(config: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler.from_config(config).alphas_cumprod.numpy()
    assert np.array_equal(model(config).alphas_cumprod, theirs.astype(np.float64))


def test_stable_diffusions_bits() -> None:
    """Its `make_beta_schedule`, which the web UI runs: float64 betas, abar kept in float32."""
    torch = pytest.importorskip("torch")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = np.cumprod(1 - betas.numpy()).astype(np.float32)
    webui = model(VEGA, "a1111")
    assert np.array_equal(webui.alphas_cumprod, theirs.astype(np.float64))
    assert np.float32(webui.sigmas[-1]) == np.float32(14.614642) != np.float32(model(VEGA).sigmas[-1])
    assert np.array_equal(webui.sigmas, webui.sigmas.astype(np.float32))


@pytest.mark.parametrize(("family", "last"), [("diffusers", 2.0**-24), ("a1111", 4.8973451890853435e-08)])
def test_zero_terminal_snr(family: str, last: float) -> None:
    """Algorithm 1 of arXiv:2305.08891 keeps the first abar and takes the last to 0, in practice a little above."""
    plain, zero = (model(config, family).alphas_cumprod for config in (VEGA, ZERO_SNR))
    assert zero[0] == pytest.approx(plain[0], rel=1e-6) and zero[-1] == np.float32(last) and (np.diff(zero) < 0).all()


def test_zero_terminal_snr_of_the_web_ui() -> None:
    """Its `rescale_zero_terminal_snr_abar` (modules/sd_models.py) stretches abar itself and never goes back to betas."""
    roots = np.sqrt(model(VEGA, "a1111").alphas_cumprod.astype(np.float32))
    stretched = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    assert np.array_equal(model(ZERO_SNR, "a1111").alphas_cumprod[:-1], (stretched**2)[:-1].astype(np.float64))


def test_zero_terminal_snr_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler.from_config(ZERO_SNR).alphas_cumprod.numpy()
    assert np.abs(model(ZERO_SNR).alphas_cumprod / theirs - 1)[:-1].max() < 2e-5
