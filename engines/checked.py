"""Rules that hold for every backend: one run at a time, checked feeds, failures in one line, and no run after close."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .library_calls import library_calls
from .protocol import Engine, Spec, describe


class CheckedEngine:
    """An Engine around a backend's, which then sees only feeds that fit, of any memory order, and none after close.

    Any thread may use it: a run waits for the one under way, and so does close.
    """

    def __init__(self, engine: Engine, name: str, path: Path) -> None:
        self.inputs = engine.inputs
        self.outputs = engine.outputs
        self._engine: Engine | None = engine
        self._turn = threading.RLock()  # reentrant: a signal's handler may close what its own thread is running
        self._label = f"engine {name}, {path.parent.name}/{path.name}"

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with library_calls, self._turn:
            if self._engine is None:
                raise EngineError(f"{self._label}: run after close; open it again")
            if fault := feeds_fault(self.inputs, feeds):
                raise EngineError(f"{self._label}: {fault}")
            try:
                return self._engine.run(feeds)
            except Exception as failure:
                raise EngineError(f"{self._label}: {reason(failure)}") from failure

    def close(self) -> None:
        with library_calls, self._turn:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()


def feeds_fault(inputs: Mapping[str, Spec], feeds: Mapping[str, NDArray[Any]]) -> str:
    """The first thing about `feeds` that does not fit `inputs`, or ''."""
    names = ", ".join(inputs) or "none"
    for name in feeds:
        if name not in inputs:
            return f"unknown input {name!r}; inputs: {names}"
    for name, spec in inputs.items():
        if name not in feeds:
            return f"input {name!r} is missing; inputs: {names}"
        array = feeds[name]
        if not isinstance(array, np.ndarray):
            return f"input {name!r} wants {spec}, got {type(array).__name__}, not an array"
        if not _fits(spec, array):
            return f"input {name!r} wants {spec}, got {describe(array.dtype, array.shape)}"
    return ""


def _fits(spec: Spec, array: NDArray[Any]) -> bool:
    if array.dtype != spec.dtype or array.ndim != len(spec.shape):
        return False
    return all(not isinstance(want, int) or want == got for want, got in zip(spec.shape, array.shape, strict=True))


def reason(failure: BaseException) -> str:
    """One line of a backend's message: the one that says what is wrong."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if not lines:
        return type(failure).__name__
    # OpenVINO begins with places in its C++ sources, one a line, and ends with the reason.
    return lines[-1] if lines[0].startswith(("Exception from ", "Check '")) else lines[0]
