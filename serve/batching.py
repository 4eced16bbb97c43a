"""How many pictures to draw at once: as many as were seen to be faster, each, than fewer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

_REMEMBERED = 3  # the least of a few: the first of a new size is slowed by allocation, any by other programs
_FORGET_AFTER = 200  # decisions; a machine's load changes


class Batching:
    """For one thread. `kind`: what the time depends on, such as model and size in px."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._seen: dict[Hashable, dict[int, deque[float]]] = {}
        self._decisions = 0

    def best(self, kind: Hashable, sizes: list[int]) -> int:
        """Which of `sizes` (pictures in a batch) to draw; one that was never tried is."""
        self._decisions += 1
        if self._decisions % _FORGET_AFTER == 0:
            self._seen.clear()
        seen = self._seen.get(kind, {})
        return min(reversed(sizes), key=lambda size: min(seen[size]) if size in seen else -1.0)

    def learn(self, kind: Hashable, size: int, seconds: float) -> None:
        """seconds: of the whole batch; infinity if it can't be drawn."""
        times = self._seen.setdefault(kind, {}).setdefault(size, deque(maxlen=_REMEMBERED))
        if math.isinf(seconds):
            times.clear()
        times.append(seconds / size)
