"""How large pictures are decoded: the runtime cuts them into tiles, and engines are built to take both."""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """In tiles of `side` px, from some side above `from_px` on with little memory, above `always_px` in any case, on
    onnxruntime-cpu above `onnxruntime_cpu_px`: a decoder's memory grows with the picture's area."""

    side: int
    from_px: int
    always_px: int
    onnxruntime_cpu_px: int

    def whole_px(self, engine: str, low_memory: bool) -> int:
        """Return the largest side that is decoded in one piece on `engine`."""
        if low_memory:
            return self.from_px
        return self.onnxruntime_cpu_px if engine == "onnxruntime-cpu" else self.always_px


# On onnxruntime-cpu a decoder as wide as SD's and SDXL's takes 3.5 GB for 896x896 px, 4.5 GB for 1024x1024.
TILING = Tiling(side=512, from_px=768, always_px=1280, onnxruntime_cpu_px=896)
