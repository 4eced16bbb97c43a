"""How large images are decoded: the runtime cuts them into tiles, and engines are built to take both."""

from __future__ import annotations

import math
from typing import NamedTuple

OVERLAP = 0.25  # the least that neighbouring tiles share, of a tile
_MULTIPLE_PX = 16


class Tiling(NamedTuple):
    """When an image is decoded in tiles, since a decoder's memory grows with the image's area.

    With little memory if a side is above `from_px`, else above `always_px`: in squares of `side` px. On onnxruntime-cpu
    if there are more pixels than `bands_above_px` squared: in bands across the shorter side, as few as stay below that.
    """

    side: int
    from_px: int
    always_px: int
    bands_above_px: int

    def tile(self, engine: str, low_memory: bool, height: int, width: int) -> tuple[int, int] | None:
        """Return a tile's height and width in px, or None for an image that is decoded in one piece."""
        if low_memory or engine != "onnxruntime-cpu":
            above = max(height, width) > (self.from_px if low_memory else self.always_px)
            return (self.side, self.side) if above else None
        most = self.bands_above_px**2
        if height * width <= most:
            return None
        short, long = sorted((height, width))
        for count in range(2, long // _MULTIPLE_PX + 1):
            band = math.ceil(long / (count - (count - 1) * OVERLAP) / _MULTIPLE_PX) * _MULTIPLE_PX
            if band * short <= most:
                return (band, short) if height >= width else (short, band)
        return self.side, self.side


# On onnxruntime-cpu a decoder as wide as SD's and SDXL's takes 3.5 GB for 896x896 px, 4.5 GB for 1024x1024 (estimated).
TILING = Tiling(side=512, from_px=768, always_px=1280, bands_above_px=896)
