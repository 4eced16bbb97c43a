"""The references that samplers are compared with, run with the fake network and injected noise. Needs torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from . import fakes
from .sampler_cells import Cell, noise_for


def run(cell: Cell) -> np.ndarray:
    """The latents that a reference ends with, in the variance-preserving form."""
    return k_diffusion(cell) if cell.family == "a1111" else through_diffusers(cell)[0]


def through_diffusers(cell: Cell) -> tuple[np.ndarray, list[float]]:
    """Latents and timesteps of diffusers' loop, as its pipelines run it."""
    diffusers.utils.logging.set_verbosity_error()  # of each option that a class does not know
    scheduler = getattr(diffusers, str(cell.row.diffusers)).from_config(cell.config, **cell.row.forced)
    options = {} if cell.eta is None else {"eta": cell.eta}
    draws = iter(noise_for(cell.steps))
    module = sys.modules[type(scheduler).__module__]
    draw = mock.patch.object(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(draws)), create=True)
    timesteps = []
    with draw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LMS: scipy's quadrature on float32
        scheduler.set_timesteps(cell.steps)
        x = torch.from_numpy(next(draws)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            timesteps.append(float(t))
            out = torch.from_numpy(fakes.network(scaled.numpy(), np.float32(t)))
            x = scheduler.step(out, t, x, **options).prev_sample
    # The one class that stays in sigma units and may end above zero; its x is decoded there as if it ended at zero.
    end = float(scheduler.sigmas[-1]) if cell.name.startswith("Euler") else 0.0
    return np.asarray(x.numpy() / np.float32(np.hypot(1, end))), timesteps


@functools.cache
def k_diffusion_alone() -> SimpleNamespace:
    """k-diffusion's `sampling` and `external`, loaded without the package, which imports half the world."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    package, utils = ModuleType("k_diffusion_alone"), ModuleType("k_diffusion_alone.utils")
    package.__path__ = []
    package.utils = utils  # type: ignore[attr-defined]
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    # sampling.py imports these for its likelihood and its own Brownian trees
    absent = {name: mock.MagicMock() for name in ("torchdiffeq", "torchsde") if importlib.util.find_spec(name) is None}
    with mock.patch.dict(sys.modules, {package.__name__: package, utils.__name__: utils, **absent}):
        for name in ("sampling", "external"):
            file = importlib.util.spec_from_file_location(f"{package.__name__}.{name}", folder / f"{name}.py")
            assert file and file.loader
            module = importlib.util.module_from_spec(file)
            sys.modules[file.name] = module
            file.loader.exec_module(module)
            setattr(package, name, module)
    return SimpleNamespace(sampling=package.sampling, external=package.external)  # type: ignore[attr-defined]


# A1111's rows: the function, and what it is given beside the levels.
_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler a": ("euler_ancestral", {}), "Euler": ("euler", {}), "LMS": ("lms", {}), "Heun": ("heun", {}),
    "DPM2": ("dpm_2", {}), "DPM2 a": ("dpm_2_ancestral", {}), "DPM++ 2S a": ("dpmpp_2s_ancestral", {}),
    "DPM++ 2M": ("dpmpp_2m", {}), "DPM++ SDE": ("dpmpp_sde", {}), "DPM++ 2M SDE": ("dpmpp_2m_sde", {}),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde", {"solver_type": "heun"}), "DPM++ 3M SDE": ("dpmpp_3m_sde", {}),
    "DPM fast": ("dpm_fast", {"eta": 1.0}), "DPM adaptive": ("dpm_adaptive", {"eta": 1.0}),
}  # fmt: skip
_DISCARDS = ("DPM2", "DPM2 a", "DPM++ 3M SDE")  # its `discard_next_to_last_sigma`


def latent_diffusion_alphas(config: dict[str, Any]) -> torch.Tensor:
    """abar as Stable Diffusion's own `make_beta_schedule` has it: computed in float64, kept in float32."""
    start, end, n = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]
    return torch.cumprod(1 - torch.linspace(start, end, n, dtype=torch.float64) ** 2, 0).float()


def k_diffusion_sigmas(model: Any, steps: int, spacing: str, discard: bool) -> torch.Tensor:
    """As A1111 has k-diffusion make them."""
    count = steps + discard
    make = getattr(k_diffusion_alone().sampling, f"get_sigmas_{spacing}", None)
    sigmas = make(count, model.sigma_min.item(), model.sigma_max.item()) if make else model.get_sigmas(count)
    return torch.cat((sigmas[:-2], sigmas[-1:])) if discard else sigmas


def k_diffusion(cell: Cell) -> np.ndarray:
    """As A1111's `modules/sd_samplers_kdiffusion.py` calls it; latents in the variance-preserving form."""
    k = k_diffusion_alone()
    spacing = next((s for s in ("Karras", "Exponential") if cell.name.endswith(s)), "")
    plain = cell.name.removesuffix(spacing).strip()
    function, options = _FUNCTIONS[plain]
    velocity = cell.config["prediction_type"] == "v_prediction"
    kind = k.external.DiscreteVDDPMDenoiser if velocity else k.external.DiscreteEpsDDPMDenoiser
    model = kind(
        lambda x, t: torch.from_numpy(fakes.network(x.numpy(), np.float32(t[0]))),
        latent_diffusion_alphas(cell.config),
        quantize=False,
    )
    low, high = model.sigma_min.item(), model.sigma_max.item()
    sigmas = k_diffusion_sigmas(model, cell.steps, spacing.lower(), plain in _DISCARDS)
    draws: Iterator[torch.Tensor] = map(torch.from_numpy, iter(noise_for(cell.steps)))
    x = next(draws) * sigmas[0]
    if cell.eta is not None:
        options = {**options, "eta": cell.eta}
    if any(a in function for a in ("ancestral", "sde", "fast", "adaptive")):
        options = {**options, "noise_sampler": lambda sigma, sigma_next: next(draws)}
    end = 0.0
    if plain in ("DPM fast", "DPM adaptive"):
        options, end = {**options, "sigma_min": low, "sigma_max": high}, low
        levels = {"n": cell.steps} if plain == "DPM fast" else {}
    else:
        levels = {"sigmas": sigmas}
    out = getattr(k.sampling, f"sample_{function}")(model, x, disable=True, **levels, **options)
    return np.asarray(out.numpy() / np.float32(np.hypot(1, end)))
