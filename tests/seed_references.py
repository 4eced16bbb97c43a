"""What torch and torchsde draw, stored so that machines without them compare too: python -m vega_edge.tests.seed_references"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED = Path(__file__).parent / "data" / "seeds.npz"
SEEDS = (0, 7, 2**32 + 5, 999_999_999_999_999)
# Whole blocks of 16, tails, and fewer than 16, which leave one over for the next.
SHAPES = ((4, 8, 8), (5,), (3,), (20,), (100,), (4,), (15,), (16,), (17,), (1,), (2, 31))
TREE_SHAPE = (2, 3, 5)
TREE_SEEDS = (7, 999_999_999_999_999)


def torch_draws(seed: int, dtype: str) -> list[NDArray[np.float32]]:
    """Consecutive draws of one generator, one a shape."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    return [torch.randn(s, generator=generator, dtype=kind).float().numpy() for s in SHAPES]


def sigmas(n: int = 12) -> list[float]:
    """Karras' grid over the range of Stable Diffusion, in float32 as k-diffusion has it."""
    ramp = np.linspace(14.614642**0.142857, 0.0291675**0.142857, n)
    return (ramp**7).astype(np.float32).tolist()


def queries() -> list[tuple[float, float]]:
    """Falling steps as samplers take them, their midpoints (not rounded to float32), a rising one, and some in no order."""
    grid = sigmas()
    steps = list(pairwise(grid))
    middles = [(a, float(np.sqrt(a * b))) for a, b in steps[::3]]
    return [*steps, *middles, (grid[-1], grid[0]), (grid[5], grid[3]), (grid[0], grid[-1]), (1.0, 1.00001)]


class TorchTree:
    """torchsde's tree as k-diffusion's BrownianTreeNoiseSampler asks it, a tree a sample, the sigmas float32 tensors."""

    def __init__(self, seeds: tuple[int, ...], low: float, high: float, shape: tuple[int, ...] = TREE_SHAPE) -> None:
        import torch
        import torchsde

        self._tensor: Any = torch.tensor
        self._trees = [
            torchsde.BrownianTree(self._tensor(low), torch.zeros(shape), self._tensor(high), entropy=s) for s in seeds
        ]

    def __call__(self, sigma: float, sigma_next: float) -> NDArray[np.float32]:
        t0, t1 = self._tensor(sigma), self._tensor(sigma_next)
        low, high, sign = (t0, t1, 1) if t0 < t1 else (t1, t0, -1)
        scale = float((t1 - t0).abs().sqrt())
        return np.stack([tree(low, high).numpy() * sign / scale for tree in self._trees])


def torch_tree() -> list[NDArray[np.float32]]:
    grid = sigmas()
    tree = TorchTree(TREE_SEEDS, grid[-1], grid[0])
    return [tree(a, b) for a, b in queries()]


def stored(name: str) -> NDArray[np.float32]:
    with np.load(STORED) as arrays:
        return arrays[name]


if __name__ == "__main__":
    flat = {
        f"{dtype}-{s}": np.concatenate([d.ravel() for d in torch_draws(s, dtype)])
        for dtype in ("fp32", "fp16")
        for s in SEEDS
    }
    STORED.parent.mkdir(exist_ok=True)
    np.savez_compressed(STORED, **flat, tree=np.stack(torch_tree()))
