"""The one thread that owns the device: takes jobs from two lines, in turn; `drawing.py` draws them. Knows no HTTP.

A walk is a generator, so between any two steps the worker can stop it, or let another one go first: a live picture
that comes while a long job runs is drawn in between, as long as the live side has used no more of the device.
"""

from __future__ import annotations

import logging
import math
import threading
import time

from ..errors import VegaEdgeError
from .drawing import LIVE, QUEUED, Drawing
from .job import Failed, Job, Overloaded, Stopping
from .line import Line, Shares
from .metrics import Metrics
from .residents import Residents

_log = logging.getLogger(__name__)


class Worker:
    """queue: how many jobs may wait, besides live ones, of which each browser has one; a client's jobs beyond half of
    that take no room from others. job_s: the device time that one job may take. `start` it once; `require_room`,
    `submit`, `cancel` and `stop` may be called from any thread.
    """

    def __init__(
        self, residents: Residents, metrics: Metrics, *, queue: int = 64, job_s: float = 300.0, batch: int = 4
    ) -> None:
        self._residents, self._queue = residents, queue
        self._lines = {LIVE: Line(), QUEUED: Line()}
        self._lanes = Shares()
        self._changed = threading.Condition()
        self._drawing = Drawing(residents, metrics, self._lines, self._changed, job_s=job_s, batch=batch)
        self._walks = self._drawing.walks
        self._stop_at: float | None = None
        self._preload: list[str] = []
        self.preloaded = False
        self.failure: str | None = None  # of preloading
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)

    def start(self, preload: list[str] | None = None) -> None:
        self._preload = preload or []
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def ahead(self, client: str) -> int | None:
        """How many other clients wait for live pictures; None where this one waits for nobody but itself."""
        with self._changed:
            others, now = self._lines[LIVE].others(client), self._drawing.now
            theirs = bool(now) and all(job.client != client for job in now)
            return others if others or theirs else None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def require_room(self, client: str) -> None:
        """Overloaded where no queued job of this client's would be taken now; Stopping, or VegaEdgeError, where none
        will be any more."""
        with self._changed:
            self._require_life()
            self._require_room(client)

    def _require_life(self) -> None:
        if self._stop_at is not None:
            raise Stopping
        if self._thread.ident is not None and not self._thread.is_alive():
            raise VegaEdgeError("the device's thread has ended; the log says why; restart the server")

    def _require_room(self, client: str) -> None:
        """Who is alone may hold more than half; the others get their half all the same when they come."""
        line, half = self._lines[QUEUED], (self._queue + 1) // 2
        held = line.held(client)
        others = len(line) > held
        retry_s = max(1, math.ceil(self._drawing.recent_s * self._queue / 2))
        if others and held >= half:
            raise Overloaded(f"{held} of your jobs wait, and others wait too; try again in {retry_s} s", retry_s)
        if (line.capped(half) if others else held) >= self._queue:
            raise Overloaded(f"the queue is full ({len(line)} jobs wait); try again in {retry_s} s", retry_s)

    def submit(self, job: Job, *, beyond_limit: bool = False) -> None:
        """As `require_room`; beyond_limit is for jobs that were accepted before a restart."""
        lane = LIVE if job.live else QUEUED
        with self._changed:
            self._require_life()
            if not job.live and not beyond_limit:
                self._require_room(job.client)
            if not self._lines[lane] and lane not in self._walks:
                self._lanes.join(lane)
            self._lines[lane].add(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Takes effect at the job's next step; its listener hears nothing more."""
        with self._changed:
            job.cancelled = True
            self._lines[LIVE if job.live else QUEUED].remove(job)

    def stop(self, grace_s: float) -> None:
        """Finishes what is being drawn, for at most `grace_s`; the waiting ones fail with Stopping. Returns at once."""
        with self._changed:
            self._stop_at = time.monotonic() + grace_s
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # From here on: the device's thread.

    def _loop(self) -> None:
        try:
            self._open_first()
            while self._next():
                pass
        finally:
            self._give_up()

    def _next(self) -> bool:
        """One step of somebody's; False when it is time to end."""
        with self._changed:
            while self._stop_at is None and not self._walks and not self.waiting:
                self._changed.wait()
            if self._stop_at is not None and (not self._walks or time.monotonic() > self._stop_at):
                return False
            lane = self._lane()
        if lane is None:
            return True
        start = time.perf_counter()
        try:
            self._drawing.turn(lane)
        except BaseException as error:
            _log.exception("a defect; what was being drawn has failed")
            self._drawing.abandon(lane, error)
        with self._changed:
            self._lanes.charge(lane, time.perf_counter() - start)
        return True

    def _give_up(self) -> None:
        for walk in list(self._walks.values()):
            self._drawing.end(walk, Stopping())
        for line in self._lines.values():
            for job in list(line.in_order()):
                line.remove(job)
                self._drawing.tell(job, Failed(Stopping(), time.monotonic() - job.submitted))
        self._residents.close_all()

    def _open_first(self) -> None:
        for model in self._preload:
            try:
                self._residents.get(model)
            except Exception as error:
                self.failure = f"{model} could not be preloaded: {error}"
                _log.exception("%s", self.failure) if not isinstance(error, VegaEdgeError) else _log.error(
                    "%s", self.failure
                )
        self.preloaded = True

    def _lane(self) -> str | None:
        """Whose turn it is. A live walk is short and goes to its end; a queued one lets live ones in between."""
        stopping = self._stop_at is not None
        lanes = [lane for lane in (LIVE, QUEUED) if lane in self._walks or (self._lines[lane] and not stopping)]
        if len(lanes) < 2:
            return lanes[0] if lanes else None
        if LIVE in self._walks:
            return LIVE
        if QUEUED in self._walks:
            first = self._lines[LIVE].first()
            assert first is not None
            if not self._residents.fits_beside(first.model, [self._walks[QUEUED].model]):
                return QUEUED
        return self._lanes.least(lanes)
