"""From what the network says to x0: scaling, prediction type, guidance. Knows feeds by name, no encoder, no size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from ..errors import EngineError
from .schedules import Schedule

Array = NDArray[np.float32]


class Denoiser:
    """`denoise(x, sigma)` for a sampler: x float32 [n, c, h, w] in sigma units -> x0 of the same shape.

    `conditioning` are the network's other feeds, [n, ...] each, or [2n, ...] with guidance: first what to move away
    from (the negative prompt), then the prompt. With guidance > 1 the two are evaluated in one batch and extrapolated
    (classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598).
    """

    def __init__(
        self, engine: Engine, schedule: Schedule, conditioning: Mapping[str, NDArray[np.generic]], guidance: float, prediction_type: str
    ) -> None:  # fmt: skip
        self._engine, self._schedule, self._guidance = engine, schedule, guidance
        self._prediction_type = prediction_type
        self._feeds = {name: _constant(value, engine.inputs[name].dtype) for name, value in conditioning.items()}
        self._time = engine.inputs["timestep"]
        self._guided = guidance > 1
        self.calls = 0

    def __call__(self, x: Array, sigma: float) -> Array:
        scale = float(np.hypot(1.0, sigma))  # of the variance-preserving form the network was trained on
        network_x = x / np.float32(scale)
        out = self._run(network_x, self._schedule.timestep(sigma))
        if self._guided:
            away, toward = np.split(out, 2)
            out = away + np.float32(self._guidance) * (toward - away)
        self.calls += 1
        if not np.isfinite(out).all():
            cure = "a precision with more range may help: --engine onnxruntime-cpu"
            raise EngineError(
                f"the network's call {self.calls} (sigma {sigma:.4g}) gave values that are not finite; {cure}"
            )
        x0: Array = out  # "sample"
        if self._prediction_type == "epsilon":
            x0 = x - np.float32(sigma) * out
        elif self._prediction_type == "v_prediction":
            x0 = network_x / np.float32(scale) - np.float32(sigma / scale) * out
        return x0

    def _run(self, network_x: Array, t: float) -> Array:
        spec = self._engine.inputs["sample"]
        batch = np.concatenate((network_x, network_x)) if self._guided else network_x
        time = np.full((1,) * len(self._time.shape), t, self._time.dtype)
        out = self._engine.run({"sample": batch.astype(spec.dtype, copy=False), "timestep": time, **self._feeds})
        return next(iter(out.values())).astype(np.float32, copy=False)


def _constant(value: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Read-only, so that an engine may keep it on its device from call to call."""
    value = np.array(value, dtype)
    value.setflags(write=False)
    return value
