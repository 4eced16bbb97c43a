"""What decoding in tiles changes: the difference from decoding the whole, and at the tiles' edges beside elsewhere.

    python -m vega_edge.bench.tiles [BUNDLE] [--size 1024] [--tile 512] -o benchmarks/results/tiles.json

Latents come from the model itself where its limits allow the size, else from pictures it drew, side by side: the numbers
are about the decoder. `edge_ratio`: the mean step between neighbouring pixels across the tiles' borders, over that
everywhere; 1 where borders can't be told from the rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.decoder import Decoder
from ..runtime.pipeline import Pipeline
from ..runtime.tiles import _starts, decode_in_tiles
from .machine import facts, markdown

PROMPT = "a big red star on a blue background"


def latents_of(pipe: Pipeline, size: int) -> NDArray[np.float32]:
    """float32 [1, c, h, w] for size px: drawn at once, or a mosaic of what the model draws."""
    least, most = pipe.limits.size_px
    if least <= size <= most:
        return pipe(PROMPT, seed=7, width=size, height=size).latents
    side = min(int(pipe.defaults["width"]), size)
    count = -(-size // side)
    drawn = [pipe(PROMPT, seed=seed, width=side, height=side).latents[0] for seed in range(count * count)]
    rows = [np.concatenate(drawn[i * count : (i + 1) * count], -1) for i in range(count)]
    return np.concatenate(rows, -2)[None]


def compare(decoder: Decoder, latents: NDArray[np.float32], tile_px: int) -> dict[str, float]:
    whole = decoder.pixels(latents, tiled=False).astype(np.float64)
    scale = decoder.scale
    tiled = decode_in_tiles(latents, scale, lambda t: decoder.pixels(t, tiled=False), (tile_px, tile_px)).astype(
        np.float64
    )
    error = tiled - whole
    tile = tile_px // scale
    starts = _starts(latents.shape[-1], tile)
    borders = sorted({s * scale for s in starts[1:]} | {(s + tile) * scale for s in starts[:-1]})
    steps = np.abs(np.diff(error, axis=2)).mean((0, 1, 3))  # of the difference: the picture's own edges don't count
    at_borders = float(steps[[b - 1 for b in borders]].mean())
    return {
        "psnr_db": float(10 * np.log10(255**2 / max((error**2).mean(), 1e-12))),
        "mean": float(np.abs(error).mean()), "largest": float(np.abs(error).max()),
        "edge_ratio": at_borders / max(float(steps.mean()), 1e-9),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="demo-vegart")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 256, 384])
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    pipe = Pipeline.open(arguments.bundle, arguments.engine, verify=False)
    latents = latents_of(pipe, arguments.size)
    results = {tile: compare(pipe._decoder, latents, tile) for tile in arguments.tile}
    rows: list[Any] = [
        (f"{tile} px", f"{r['psnr_db']:.1f} dB", f"{r['mean']:.2f}", f"{r['largest']:.0f}", f"{r['edge_ratio']:.2f}")
        for tile, r in results.items()
    ]
    print(
        markdown(
            [f"tiles of a {arguments.size}x{arguments.size} picture", "PSNR", "mean level", "largest", "borders"], rows
        )
    )
    if arguments.output:
        arguments.output.parent.mkdir(exist_ok=True)
        record = {**facts(), "bundle": pipe.name, "size": arguments.size, "tiles": results}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
