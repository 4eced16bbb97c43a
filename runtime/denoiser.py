"""From what the network says to x0: scaling, prediction type, guidance. Knows feeds by name, no encoder, no size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from ..errors import NotFiniteError
from .schedules import Schedule

Array = NDArray[np.float32]


class Denoiser:
    """`denoise(x, sigma)` for a sampler: x float32 [n, c, h, w] in sigma units -> x0 of the same shape.

    `conditioning` are the network's other feeds, [n, ...] each, or [2n, ...] with guidance: first what to move away
    from (the negative prompt), then the prompt. With guidance > 1 the two are evaluated in one batch and extrapolated
    (classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598). rescale: how much of the contrast that this adds
    is taken back, 0 to 1. `step` is the step that the calls are made for, counted on by whoever walks; with
    engine_name it is what the error names.
    """

    def __init__(
        self, engine: Engine, schedule: Schedule, conditioning: Mapping[str, NDArray[np.generic]], guidance: float,
        prediction_type: str, *, rescale: float = 0.0, engine_name: str = "the engine",
    ) -> None:  # fmt: skip
        self._engine, self._schedule, self._guidance, self._rescale = engine, schedule, guidance, rescale
        self._prediction_type, self._engine_name = prediction_type, engine_name
        self._feeds = {name: _constant(value, engine.inputs[name].dtype) for name, value in conditioning.items()}
        self._time = engine.inputs["timestep"]
        self._guided = guidance > 1
        self.step = 1

    def __call__(self, x: Array, sigma: float) -> Array:
        scale = math.hypot(1.0, sigma)  # of the variance-preserving form the network was trained on
        network_x = x * np.float32(1 / scale)
        out = self._run(network_x, self._schedule.timestep(sigma))
        if not _finite(out):
            full = self._engine_name == "onnxruntime-cpu"
            cure = (
                "export in fp32 if it was not"
                if full
                else "a precision with more range may help: --engine onnxruntime-cpu"
            )
            raise NotFiniteError(
                f"{self._engine_name} gave values that are not finite at step {self.step} (sigma {sigma:.4g}); {cure}"
            )
        if self._guided:
            away, toward = np.split(out, 2)
            out = away + np.float32(self._guidance) * (toward - away)
            if self._rescale:
                out = rescaled(out, toward, self._rescale)
        x0: Array = out  # "sample"
        if self._prediction_type == "epsilon":
            x0 = out * np.float32(-sigma)
            x0 += x
        elif self._prediction_type == "v_prediction":
            x0 = out * np.float32(-sigma / scale)
            x0 += network_x * np.float32(1 / scale)
        return x0

    def _run(self, network_x: Array, t: float) -> Array:
        spec = self._engine.inputs["sample"]
        batch = np.concatenate((network_x, network_x)) if self._guided else network_x
        if np.issubdtype(self._time.dtype, np.integer):  # some exports take whole timesteps; a cast would cut 665.9999
            t = round(t)
        time = np.full((1,) * len(self._time.shape), t, self._time.dtype)
        out = self._engine.run({"sample": batch.astype(spec.dtype, copy=False), "timestep": time, **self._feeds})
        return next(iter(out.values())).astype(np.float32, copy=False)


def rescaled(guided: Array, prompted: Array, share: float) -> Array:
    """Guidance rescale, Lin et al. 2023 (arXiv:2305.08891, equations 15 and 16), each sample by itself.

    `guided` is given the standard deviation that the prediction for the prompt alone has, and mixed with itself.
    """
    axes = tuple(range(1, guided.ndim))
    contrast = prompted.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return np.asarray(guided * (np.float32(share) * contrast + np.float32(1 - share)), np.float32)


def _finite(values: Array) -> bool:
    """The sum of squares tells in one pass; only where it overflows, which large values can do too, each is looked at."""
    return bool(np.isfinite(np.vdot(values, values)) or np.isfinite(values).all())


def _constant(value: NDArray[np.generic], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Read-only, so that an engine may keep it on its device from call to call."""
    value = np.array(value, dtype)
    value.setflags(write=False)
    return value
