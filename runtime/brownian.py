"""A Brownian path by seed that can be asked anywhere, in any order: what the SDE samplers draw their noise from.

Two runs of a sampler with different steps then see the same path. It equals `torchsde.BrownianTree` (tolerance 1e-6,
pool of 24) as k-diffusion's `BrownianTreeNoiseSampler` asks it: the interval from the lowest to the highest sigma is
halved again and again, each half being a Brownian bridge of the whole (Lévy's construction), and the noise of a node
is drawn from a seed that numpy's SeedSequence makes of the entropy and the node's place. No torch here; the numbers
of a node come from whatever `draw` is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .samplers import Noise

Array = NDArray[np.float32]
Draw = Callable[[int], Array]  # a node's seed -> its normal deviates

_DIGITS = 6  # sigmas are rounded to the tolerance, 1e-6
_POOL = 24
_KEPT = 64  # nodes whose noise is kept: two paths from the root, 25 levels each, and some


class _Node(NamedTuple):
    start: float
    end: float
    increment: Array
    key: int  # its place among the nodes of its depth
    depth: int


class BrownianTree:
    """W on [low, high], constant outside, with `tree(a, b)` = W(b) - W(a) for a <= b, float32 of the shape `draw` gives."""

    def __init__(self, entropy: int, low: float, high: float, draw: Draw) -> None:
        self._entropy, self._draw = entropy, draw
        seed = _sequence(entropy).generate_state(1)[0]
        low, high = _single(low), _single(high)
        increment = draw(int(seed)) * np.float32(math.sqrt(high - low))
        self._root = _Node(round(low, _DIGITS), round(high, _DIGITS), increment, 0, 0)
        self._left: dict[tuple[int, int], Array] = {}  # of (key, depth): the increment of the left half

    def __call__(self, a: float, b: float) -> Array:
        a, b = (round(_single(s), _DIGITS) for s in (a, b))
        total = np.zeros_like(self._root.increment)
        for node in self._cover(self._root, a, b):
            total += node.increment
        return total

    def _cover(self, node: _Node, a: float, b: float) -> Iterator[_Node]:
        """The fewest nodes that make up what of [a, b] is in the range, from left to right."""
        if b <= node.start or a >= node.end or a == b:
            return
        if a <= node.start and b >= node.end:
            yield node
            return
        for half in self._halves(node):
            yield from self._cover(half, a, b)

    def _halves(self, node: _Node) -> tuple[_Node, _Node]:
        middle = round(0.5 * (node.end + node.start), _DIGITS)
        at = (node.key, node.depth)
        left = self._left.pop(at, None)
        if left is None:
            left = self._bridge(node, middle)
        self._left[at] = left  # now the youngest
        if len(self._left) > _KEPT:
            del self._left[next(iter(self._left))]
        return (
            _Node(node.start, middle, left, 2 * node.key, node.depth + 1),
            _Node(middle, node.end, node.increment - left, 2 * node.key + 1, node.depth + 1),
        )

    def _bridge(self, node: _Node, middle: float) -> Array:
        """W(middle) - W(start) given the node's increment: normal, with mean and variance of a Brownian bridge."""
        seed = _sequence(self._entropy, (node.key, node.depth)).generate_state(1)[0]
        before, after, share = middle - node.start, node.end - middle, 1 / (node.end - node.start)
        left: Array = self._draw(int(seed)) * np.float32(math.sqrt(before * after * share))
        left += node.increment * np.float32(before) * np.float32(share)
        return left


def sampled(trees: Sequence[BrownianTree]) -> Noise:
    """noise(sigma, sigma_next) = (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|), one tree a sample."""

    def noise(sigma: float, sigma_next: float) -> Array:
        low, high = sorted((sigma, sigma_next))
        sign = 1 if sigma < sigma_next else -1
        width = np.float32(abs(np.float32(sigma_next) - np.float32(sigma)))
        increments: Array = np.stack([tree(low, high) for tree in trees])
        return np.asarray(increments * (sign / np.sqrt(width)), np.float32)

    return noise


def _sequence(entropy: int, key: tuple[int, ...] = ()) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy, spawn_key=key, pool_size=_POOL)


def _single(sigma: float) -> float:
    """k-diffusion's sigmas are float32, and which of two neighbours the tolerance rounds to depends on it."""
    return float(np.float32(sigma))
