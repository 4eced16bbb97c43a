"""The numbers torch's CPU generator draws, in numpy.

`torch.Generator().manual_seed(seed)` is a Mersenne Twister; `torch.randn` turns its words into normal deviates with
the Box-Muller transform, in one of two ways. Source: ATen/native/cpu/DistributionTemplates.h (`normal_fill`) and
ATen/core/DistributionsHelper.h (`normal_distribution`). Values agree with torch's to 5e-7.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 999_999_999_999_999  # the API pages' largest
_FLOAT_BITS = np.uint32((1 << 24) - 1)
_DOUBLE_BITS = (1 << 53) - 1


class TorchGenerator:
    """One stream of float32 normal deviates; consecutive draws continue it, as on a `torch.Generator`."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the second of a pair that a short draw left over

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """`torch.randn(shape, generator=...)`, float32."""
        n = math.prod(shape)
        flat = self._long(n) if n >= 16 else np.array([self._single() for _ in range(n)], np.float32)
        return flat.reshape(shape)

    def _uniform(self, n: int) -> NDArray[np.float32]:
        words = self._words.randint(0, 2**32, size=n, dtype=np.uint32)
        uniform: NDArray[np.float32] = (words & _FLOAT_BITS).astype(np.float32) * np.float32(2**-24)
        return uniform

    def _long(self, n: int) -> NDArray[np.float32]:
        """16 values and more: blocks of 16; an incomplete last block is drawn anew over the last 16 values."""
        out = self._uniform(n)
        whole = n // 16 * 16
        out[:whole] = _box_muller(out[:whole])
        if whole < n:
            out[-16:] = _box_muller(self._uniform(16))
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


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blocks of 16: the first eight give radii, the last eight angles; cosines come first, then sines."""
    block = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - block[:, 0]))
    angle = np.float32(2 * np.pi) * block[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).reshape(-1)


class NoiseSource:
    """Noise for several samples, each with its own stream: sample i is what seed + i draws alone."""

    def __init__(self, seeds: list[int]) -> None:
        self._streams = [TorchGenerator(s) for s in seeds]

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """float32 [samples, *shape]."""
        return np.stack([s.randn(shape) for s in self._streams])
