"""A large picture, decoded tile by tile, so that memory does not grow with it.

Tiles overlap and are blended along straight ramps. They can't be exactly what one decoding gives: the autoencoder's
group norms and its attention look at the whole of what they are given. `bench/tiles.py` measures the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..tiling import OVERLAP, TILING

Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]


def decode_in_tiles(
    latents: NDArray[np.float32],
    scale: int,
    decode: Decode,
    tile_px: tuple[int, int] = (TILING.side, TILING.side),
) -> NDArray[np.uint8]:
    """Latents [n, c, h, w] -> pixels uint8 [n, h * scale, w * scale, 3]; `decode` gets tiles [1, c, th, tw].

    tile_px: a tile's height and width.
    """
    n, _, h, w = latents.shape
    high, wide = (min(side, max(px // scale, 1)) for side, px in zip((h, w), tile_px, strict=True))
    rows, columns = _starts(h, high), _starts(w, wide)
    out = np.zeros((n, h * scale, w * scale, 3), np.float32)
    for i in range(n):
        for y, up in zip(rows, _ramps(rows, high, scale), strict=True):
            for x, left in zip(columns, _ramps(columns, wide, scale), strict=True):
                pixels = decode(latents[i : i + 1, :, y : y + high, x : x + wide])[0]
                place = out[i, y * scale : (y + high) * scale, x * scale : (x + wide) * scale]
                place += pixels * (up[:, None, None] * left[:, None])
    return np.rint(out).astype(np.uint8)


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin: as few as cover it with the overlap, evenly spread."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // max(int(tile * (1 - OVERLAP)), 1))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramps(starts: list[int], tile: int, scale: int) -> list[NDArray[np.float32]]:
    """Each tile's weight along one side, in pixels: a straight ramp through what it shares with its neighbour. The
    weights over one pixel sum to 1.
    """
    weights = []
    total = np.zeros((starts[-1] + tile) * scale, np.float32)
    for i, start in enumerate(starts):
        at = np.arange(start * scale, (start + tile) * scale, dtype=np.float32) + np.float32(0.5)
        weight = np.ones_like(at)
        if i:
            shared = (starts[i - 1] + tile - start) * scale
            weight = np.minimum(weight, (at - start * scale) / shared)
        if i + 1 < len(starts):
            shared = (start + tile - starts[i + 1]) * scale
            weight = np.minimum(weight, ((start + tile) * scale - at) / shared)
        weights.append(weight)
        total[start * scale : (start + tile) * scale] += weight
    shares = (w / total[start * scale : (start + tile) * scale] for w, start in zip(weights, starts, strict=True))
    return [share.astype(np.float32, copy=False) for share in shares]
