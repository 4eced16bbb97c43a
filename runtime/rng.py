"""Noise by seed: one stream a sample, drawn as torch's CPU generator or as AUTOMATIC1111's NV source draws it.

`torch.Generator().manual_seed(seed)` is a Mersenne Twister; `torch.randn` turns its words into normal deviates with
the Box-Muller transform, in one of two ways. Source: ATen/native/cpu/DistributionTemplates.h (`normal_fill`) and
ATen/core/DistributionsHelper.h (`normal_distribution`). Values agree with torch's to 5e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import unknown
from .brownian import BrownianTree, sampled
from .rng_nv import PhiloxGenerator
from .samplers import Noise

Array = NDArray[np.float32]

MAX_SEED = 999_999_999_999_999  # the API pages' largest
NOISE_DTYPES = ("fp32", "fp16")
_FLOAT_BITS = np.uint32((1 << 24) - 1)
_DOUBLE_BITS = (1 << 53) - 1


class Generator(Protocol):
    """One stream of normal deviates; consecutive draws continue it."""

    def randn(self, shape: tuple[int, ...]) -> Array: ...


class TorchGenerator:
    """The stream of a `torch.Generator` on the CPU: float32, or with `half` what a draw of float16 gives.

    Half values are computed in float32 and rounded, and so are those of float32 up to the rounding, but where the
    count is no multiple of 16 the stream moves on by other words. That is torch since 2.11; before, half tensors were
    computed in half (11-bit uniforms, each operation rounded), which is not reproduced.
    """

    def __init__(self, seed: int, half: bool = False) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._half = half
        self._spare: float | None = None  # the second of a pair that a short draw left over

    def randn(self, shape: tuple[int, ...]) -> Array:
        """`torch.randn(shape, generator=...)`, as float32."""
        n = math.prod(shape)
        flat = self._long(n) if n >= 16 else np.array([self._single() for _ in range(n)], np.float32)
        if self._half:
            flat = flat.astype(np.float16).astype(np.float32)
        return flat.reshape(shape)

    def _uniform(self, n: int) -> Array:
        words = self._words.randint(0, 2**32, size=n, dtype=np.uint32)
        words &= _FLOAT_BITS
        uniform = words.astype(np.float32)
        uniform *= np.float32(2**-24)
        return uniform

    def _long(self, n: int) -> Array:
        """16 values and more: blocks of 16; an incomplete last block is drawn anew over the last 16 values.

        For float32 torch has drawn that block before, for half it has not: the stream differs from there on.
        """
        whole = n // 16 * 16
        out = _box_muller(self._uniform(whole if self._half else n)[:whole])
        if whole < n:
            kept = out[: n - 16]
            out = np.concatenate((kept, _box_muller(self._uniform(16))))
        return out

    def _single(self) -> float:
        """Fewer than 16: pairs in double precision; the sine half is kept for the next draw."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        words = [int(w) for w in self._words.randint(0, 2**32, size=4, dtype=np.uint32)]
        angle, size = (((words[i] << 32 | words[i + 1]) & _DOUBLE_BITS) * 2.0**-53 for i in (0, 2))
        radius = math.sqrt(-2 * math.log1p(-size))
        self._spare = radius * math.sin(2 * math.pi * angle)
        return radius * math.cos(2 * math.pi * angle)


def _box_muller(uniform: Array) -> Array:
    """In place, by blocks of 16: the first eight give radii, the last eight angles; cosines come first, then sines."""
    block = uniform.reshape(-1, 2, 8)
    radius, angle = 1 - block[:, 0], block[:, 1] * np.float32(2 * np.pi)
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    np.multiply(radius, np.cos(angle), out=block[:, 0])
    np.multiply(radius, np.sin(angle), out=block[:, 1])
    return uniform


GENERATORS: Mapping[str, Callable[[int, bool], Generator]] = {"torch": TorchGenerator, "nv": PhiloxGenerator}


class NoiseSource:
    """Noise for several samples, each with its own stream: sample i is what its seed draws alone.

    rng: "torch" is the CPU generator, "nv" AUTOMATIC1111's NV source. dtype: "fp16" draws as pipelines in half do.
    """

    def __init__(self, seeds: Sequence[int], rng: str = "torch", dtype: str = "fp32") -> None:
        if rng not in GENERATORS:
            raise unknown("rng", rng, GENERATORS)
        if dtype not in NOISE_DTYPES:
            raise unknown("noise dtype", dtype, NOISE_DTYPES)
        self._seeds, self._rng, self._half = seeds, rng, dtype == "fp16"
        self._streams = [self._generator(s) for s in seeds]

    def _generator(self, seed: int) -> Generator:
        return GENERATORS[self._rng](seed, self._half)

    def __call__(self, shape: tuple[int, ...]) -> Array:
        """float32 [samples, *shape], the next of every stream."""
        drawn = [s.randn(shape) for s in self._streams]
        return drawn[0][None] if len(drawn) == 1 else np.stack(drawn)

    def brownian(self, shape: tuple[int, ...], sigma_min: float, sigma_max: float) -> Noise:
        """Increments of one Brownian tree a sample, whose entropy is its seed; apart from the streams.

        AUTOMATIC1111 draws the nodes with the generator that the user chose (its `torchsde_randn`), and so do we.
        """

        def draw(seed: int) -> Array:
            return self._generator(seed).randn(shape)

        return sampled([BrownianTree(s, sigma_min, sigma_max, draw) for s in self._seeds])
