"""Runs every reference once and stores what it ends with, for machines without torch: tests/data/samplers.npz.

python -m vega_edge.tests.make_sampler_data      (about three minutes; needs torch, diffusers, k-diffusion)
"""

from __future__ import annotations

import sys

import numpy as np

from . import references
from .sampler_cells import DATA, compared, stored


def main() -> None:
    cells = compared()
    have = stored() if "--missing" in sys.argv else {}
    latents = np.stack([have[str(c)] if str(c) in have else references.run(c) for c in cells])
    DATA.parent.mkdir(exist_ok=True)
    names = "\n".join(map(str, cells)).encode()
    np.savez_compressed(DATA, latents=latents.astype(np.float32), cells=np.frombuffer(names, np.uint8))
    print(f"{DATA}: {len(cells)} cells, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
