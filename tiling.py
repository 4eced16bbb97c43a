"""How large pictures are decoded: the runtime cuts them into tiles, and engines are built to take both."""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """In tiles of `side` px, from some side above `from_px` on with little memory, above `always_px` in any case, on a CPU
    above `cpu_px`: a decoder's memory grows with the picture's area."""

    side: int
    from_px: int
    always_px: int
    cpu_px: int


TILING = Tiling(side=512, from_px=768, always_px=1280, cpu_px=1024)
