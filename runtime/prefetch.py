"""The next noise, drawn on a thread while the network runs on this one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .samplers import Noise

Array = NDArray[np.float32]
_ANY = (0.0, 0.0)


class Prefetch:
    """`noise` with one draw made ahead; gives the same numbers in the same order.

    All draws are made by one worker thread, one after the other, so `noise` needs no lock. intervals: the sigmas that
    will be asked for, in order, where the answer depends on them (a Brownian path); a draw for another interval is then
    made when asked for, and what lies ready waits for its own. None: independent draws, which fit any interval.
    Used with `with`, whose end stops the thread: closing a generator that holds it is enough.
    """

    def __init__(self, noise: Noise, intervals: Iterable[tuple[float, float]] | None = None) -> None:
        self._noise, self._any = noise, intervals is None
        self._intervals = itertools.repeat(_ANY) if intervals is None else iter(intervals)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._expected: tuple[float, float] | None = None
        self._ready: Future[Array] | None = None

    def __enter__(self) -> Prefetch:
        self._start_next()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._worker.shutdown(cancel_futures=True)

    def __call__(self, sigma: float, sigma_next: float) -> Array:
        if self._ready is None or not (self._any or (sigma, sigma_next) == self._expected):
            return self._submit(sigma, sigma_next).result()
        array = self._ready.result()
        self._start_next()
        return array

    def _start_next(self) -> None:
        self._expected = next(self._intervals, None)
        self._ready = self._submit(*self._expected) if self._expected else None

    def _submit(self, sigma: float, sigma_next: float) -> Future[Array]:
        try:
            return self._worker.submit(self._noise, sigma, sigma_next)
        # Python ends and starts no more threads, while a daemon thread draws: it makes its own noise
        except RuntimeError:
            done: Future[Array] = Future()
            done.set_result(self._noise(sigma, sigma_next))
            return done
