"""The models that are open. The least recently used one is closed to make room for another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ..errors import VegaEdgeError
from ..runtime.request import Request

_log = logging.getLogger(__name__)
_MB = 1_000_000


class Drawer(Protocol):
    """What the worker needs of a `Pipeline`."""

    name: str
    engine: str

    def request(self, prompt: str, **options: Any) -> Request: ...
    def draw(self, requests: Any) -> Any: ...
    def close(self) -> None: ...


class Residents:
    """For one thread. A model is counted with the size of its graphs' files: the budget is for weights, and what
    drawing takes comes on top. budget_bytes None: no limit.
    """

    def __init__(
        self, open_model: Callable[[str], Drawer], bytes_of: Callable[[str], int], budget_bytes: int | None = None,
        swapped: Callable[[str, str, float], None] = lambda action, model, seconds: None,
    ) -> None:  # fmt: skip
        self._open_model, self._bytes_of, self._budget, self._swapped = open_model, bytes_of, budget_bytes, swapped
        self._open: dict[str, tuple[Drawer, int]] = {}  # least recently used first

    @property
    def names(self) -> list[str]:
        return list(self._open)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in list(self._open.values()))

    def fits_beside(self, model: str, kept: Collection[str]) -> bool:
        """Whether it is open or could be, without closing those `kept`."""
        if model in self._open or self._budget is None:
            return True
        try:
            needed = self._bytes_of(model)
        except (VegaEdgeError, OSError):
            return True  # it will say so when it is opened, which takes no room
        return needed + sum(size for name, (_, size) in self._open.items() if name in kept) <= self._budget

    def get(self, model: str, kept: Collection[str] = ()) -> Drawer:
        """Opens it if need be. VegaEdgeError where that fails, or where the budget is too small for it."""
        if model in self._open:
            self._open[model] = self._open.pop(model)
            return self._open[model][0]
        size = self.require_size(model)
        self._make_room(size, kept)
        start = time.perf_counter()
        drawer = self._open_model(model)
        seconds = time.perf_counter() - start
        self._open[model] = drawer, size
        self._swapped("open", model, seconds)
        _log.info("%s is open on %s (%d MB, %.2f s)", model, drawer.engine, size // _MB, seconds)
        return drawer

    def require_size(self, model: str) -> int:
        """The model's bytes. VegaEdgeError where the budget is too small for it."""
        size = self._bytes_of(model)
        if self._budget is not None and size > self._budget:
            raise VegaEdgeError(
                f"{model} takes {size / _MB:.0f} MB, and the memory budget is {self._budget / _MB:.0f} MB; raise --memory-budget"
            )
        return size

    def _make_room(self, size: int, kept: Collection[str]) -> None:
        if self._budget is None:
            return
        for name in [n for n in self._open if n not in kept]:
            if self.bytes + size <= self._budget:
                return
            self.close(name)

    def close(self, model: str) -> None:
        drawer, _ = self._open.pop(model)
        start = time.perf_counter()
        drawer.close()
        self._swapped("close", model, time.perf_counter() - start)
        _log.info("%s is closed to make room", model)

    def close_all(self) -> None:
        for drawer, _ in self._open.values():
            drawer.close()
        self._open.clear()
