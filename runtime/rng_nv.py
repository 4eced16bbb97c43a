"""AUTOMATIC1111's "NV" random source: what `torch.randn` draws on an NVIDIA GPU, as far as a definition can say it.

One Philox4x32-10 block an element (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the
64-bit seed. Counter words: 0 is the index of the draw, one more each call whatever the size; 2 is the element. The
first two words of the block make one normal deviate, the other two are thrown away. Definition: `modules/rng_philox.py`
of stable-diffusion-webui.

A GPU gives each thread one block and starts over with the next index when the threads run out. So this equals torch
on a GPU only while a tensor fits into one launch grid, such as 43,008 elements on an RTX 3060; a larger one
(1x4x128x128 is 65,536) equals AUTOMATIC1111's NV, and no GPU's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the fractions of the golden ratio and of sqrt(3) - 1
_CHUNK = 4096  # elements at once, so that all of a round stays in the processor's cache
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = float(np.float32(2**-32))
_TURN = float(np.float32(2.3283064e-10 * 6.2831855))  # 2 pi / 2^32 as the definition rounds it


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters [4, n], 32-bit words in uint64; the result likewise."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (np.uint64((k + i * step) & 0xFFFFFFFF) for k, step in zip(key, _KEY_STEPS, strict=True))
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> _SHIFT) ^ b ^ k0, second & _LOW, (first >> _SHIFT) ^ d ^ k1, first & _LOW
    return np.stack((a, b, c, d))


class PhiloxGenerator:
    """One stream of float32 normal deviates; with `half` rounded to float16, as the web UI casts them."""

    def __init__(self, seed: int, half: bool = False) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._half = half
        self._draws = 0

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        normal = np.empty(math.prod(shape), np.float32)
        for start in range(0, len(normal), _CHUNK):
            part = normal[start : start + _CHUNK]
            part[:] = self._normal(np.arange(start, start + len(part), dtype=np.uint64))
        self._draws += 1
        if self._half:
            normal = normal.astype(np.float16).astype(np.float32)
        return normal.reshape(shape)

    def _normal(self, elements: NDArray[np.uint64]) -> NDArray[np.float64]:
        counter = np.zeros((4, len(elements)), np.uint64)
        counter[0], counter[2] = self._draws, elements
        words = philox(counter, self._key)
        radius = np.sqrt(-2 * np.log(words[0] * _UNIT + _UNIT / 2))
        return np.asarray(radius * np.sin(words[1] * _TURN + _TURN / 2))
