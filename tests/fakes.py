"""Stand-ins for networks: small, smooth, non-linear, and the same in numpy on both sides of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vega_edge.engines import Spec
from vega_edge.runtime.denoiser import Denoiser
from vega_edge.runtime.schedulers import Scheduler

VEGA = {
    "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip


def network(x: NDArray[Any], t: float) -> NDArray[Any]:
    """A made-up prediction: depends on x (non-linearly), on neighbours, and on the timestep down to a single one."""
    near = np.roll(x, 1, -1)
    return (np.tanh(0.8 * x + 0.1 * near) + 0.2 * np.sin(x * 2 + t / 90.0)).astype(x.dtype)


class NetworkEngine:
    """The fake network behind the engine protocol."""

    def __init__(self) -> None:
        self.inputs = {"sample": Spec(np.dtype(np.float32), (None,) * 4), "timestep": Spec(np.dtype(np.float32), (1,))}
        self.outputs = {"out_sample": Spec(np.dtype(np.float32), (None,) * 4)}
        self.timesteps: list[float] = []

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        t = float(feeds["timestep"][0])
        self.timesteps.append(t)
        return {"out_sample": network(feeds["sample"], t)}

    def close(self) -> None:
        pass


def walk(
    scheduler: Scheduler, config: dict[str, Any], steps: int, noise: Iterable[NDArray[np.float32]],
    named: str | None = None,
) -> SimpleNamespace:  # fmt: skip
    """Our walk with injected noise, in the form diffusers ends in: latents, timesteps, every step."""
    model = scheduler.noise_model(config)
    schedule = scheduler.schedule(model, steps, named)
    engine = NetworkEngine()
    denoise = Denoiser(engine, schedule, {}, 0.0, model.config["prediction_type"])
    draws = iter(noise)
    x = next(draws) * np.float32(schedule.scale)
    done = list(scheduler.sampler(denoise, x, schedule, lambda sigma, sigma_next: next(draws)))
    last = done[-1]
    return SimpleNamespace(latents=last.x / np.float32(np.hypot(1, last.sigma)), timesteps=engine.timesteps, steps=done)
