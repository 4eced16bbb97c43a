"""How often one key may ask."""

from __future__ import annotations

import time


class Rate:
    """A token bucket for each name; a minute's worth of requests may come at once. per_minute 0: no limit."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """0 where the request may go on, or the seconds until it may."""
        if not self._most:
            return 0.0
        now = time.monotonic()
        left, at = self._left.get(name, (self._most, now))
        left = min(self._most, left + (now - at) * self._most / 60)
        if left < 1:
            return (1 - left) * 60 / self._most
        self._left[name] = left - 1, now
        return 0.0

    def refusal(self, wait_s: float) -> str:
        return f"more than {self._most:g} requests a minute; try again in {wait_s:.1f} s"
