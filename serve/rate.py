"""How many pictures one key may ask for."""

from __future__ import annotations

import math
import time


class Rate:
    """A token bucket for each name; a minute's worth of pictures may come at once. per_minute 0: no limit."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """0 where the request may go on, or the seconds until it may, in full tenths: who waits for so long is let in."""
        if not self._most:
            return 0.0
        now = time.monotonic()
        left, at = self._left.get(name, (self._most, now))
        left = min(self._most, left + (now - at) * self._most / 60)
        if left < 1:
            return math.ceil(round((1 - left) * 600 / self._most, 6)) / 10
        self._left[name] = left - 1, now
        return 0.0

    def charge(self, name: str, more: int) -> None:
        """For what a request turned out to be beyond the one that was taken; what is owed is waited for next time."""
        if name in self._left:
            left, at = self._left[name]
            self._left[name] = left - more, at

    def refusal(self, wait_s: float) -> str:
        return f"more than {self._most:g} pictures a minute; try again in {wait_s:.1f} s"
