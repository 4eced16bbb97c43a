"""The one thread that owns the device: takes jobs from two lines, draws, tells their listeners. Knows no HTTP.

A walk is a generator, so between any two steps the worker can stop it, or let another one go first: a live picture
that comes while a long job runs is drawn in between, as long as the live side has used no more of the device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

from ..errors import VegaEdgeError
from ..runtime.request import alike
from .batching import Batching
from .job import Done, Failed, Job, Overloaded, Started, Stepped, Stopping, TookTooLong
from .line import Line, Shares
from .metrics import Metrics
from .residents import Drawer, Residents
from .walking import Walk

_log = logging.getLogger(__name__)
LIVE, QUEUED = "live", "queued"


class Worker:
    """queue: how many jobs may wait, besides live ones, of which each browser has one. job_s: the device time that one
    may take. `start` it once; `submit`, `cancel` and `stop` may be called from any thread.
    """

    def __init__(
        self, residents: Residents, metrics: Metrics, *, queue: int = 64, job_s: float = 300.0, batch: int = 4
    ) -> None:
        self._residents, self._metrics, self._queue, self._job_s = residents, metrics, queue, job_s
        self._batching = Batching(batch)
        self._lines = {LIVE: Line(), QUEUED: Line()}
        self._lanes = Shares()
        self._walks: dict[str, Walk] = {}
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._preload: list[str] = []
        self._recent_s = 1.0  # a queued picture, smoothed
        self.preloaded = False
        self.failure: str | None = None  # of preloading
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)

    def start(self, preload: list[str] | None = None) -> None:
        self._preload = preload or []
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job, *, beyond_limit: bool = False) -> None:
        """Overloaded where the queue is full; beyond_limit is for jobs that were accepted before a restart."""
        lane = LIVE if job.live else QUEUED
        with self._changed:
            if self._stop_at is not None:
                raise Stopping
            if not job.live and not beyond_limit and len(self._lines[QUEUED]) >= self._queue:
                retry_s = max(1, math.ceil(self._recent_s * self._queue / 2))
                raise Overloaded(f"the queue is full ({self._queue} jobs wait); try again in {retry_s} s", retry_s)
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
        self._open_first()
        while True:
            with self._changed:
                while self._stop_at is None and not self._walks and not self.waiting:
                    self._changed.wait()
                stopping = self._stop_at is not None
                lane = self._lane()
            if stopping and (not self._walks or time.monotonic() > (self._stop_at or 0)):
                break
            if lane is not None:
                self._turn(lane)
        for walk in list(self._walks.values()):
            self._end(walk, Stopping())
        for line in self._lines.values():
            for job in list(line.in_order()):
                line.remove(job)
                self._tell(job, Failed(Stopping(), time.monotonic() - job.submitted))
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

    def _turn(self, lane: str) -> None:
        """Begins a walk in the lane, or goes one step on with it."""
        start = time.perf_counter()
        walk = self._walks.get(lane)
        if walk is None:
            self._begin(lane)
        elif all(job.cancelled for job in walk.jobs):
            self._end(walk, None)
        else:
            self._step(walk)
        self._lanes.charge(lane, time.perf_counter() - start)

    def _begin(self, lane: str) -> None:
        line = self._lines[lane]
        with self._changed:
            job = line.first()
            if job is None or not line.remove(job):  # cancelled meanwhile
                return
        self._tell(
            job, Started(time.monotonic() - job.submitted)
        )  # before a model is opened, which may end the process
        kept = [walk.model for walk in self._walks.values()]
        try:
            drawer = self._residents.get(job.model, kept)
            job.request = drawer.request(job.prompt, **job.options)
        except Exception as error:
            self._fail(job, error)
            return
        companions = self._companions(line, drawer, job)
        self._walks[lane] = walk = Walk(lane, drawer, [job, *companions])
        for other in companions:
            self._tell(other, Started(walk.queue_s[other]))

    def _companions(self, line: Line, drawer: Drawer, job: Job) -> list[Job]:
        """Waiting jobs to draw in the same batch: those that are alike, as many as are worth it."""
        if job.live:
            return []
        assert job.request is not None
        with self._changed:
            others = [other for other in line.in_order() if other.model == job.model]
        found, total, sizes = [], job.samples, [job.samples]
        for other in others:
            if total + other.samples > self._batching.most:
                continue
            try:
                other.request = other.request or drawer.request(other.prompt, **other.options)
            except VegaEdgeError:
                continue  # it is told when its turn comes
            if alike(job.request, other.request):
                found.append(other)
                total += other.samples
                sizes.append(total)
        best = self._batching.best(_kind(job), sizes)
        with self._changed:
            return [other for other, size in zip(found, sizes[1:], strict=True) if size <= best and line.remove(other)]

    def _step(self, walk: Walk) -> None:
        try:
            done = walk.advance()
        except Exception as error:
            self._broke(walk, error)
            return
        if done is not None:
            self._finish(walk, done)
            return
        for job in walk.jobs:
            if not job.cancelled:
                self._tell(job, Stepped(walk.index, walk.total, walk.preview))
        if walk.draw_s > self._job_s:
            text = f"drawing took longer than the limit of {self._job_s:g} s; ask for fewer steps or a smaller picture"
            self._end(walk, TookTooLong(text))

    def _finish(self, walk: Walk, results: list[Any]) -> None:
        del self._walks[walk.lane]
        pictures = sum(len(result.images) for result in results)
        self._metrics.batch(pictures)
        self._batching.learn(_kind(walk.jobs[0]), pictures, walk.draw_s)
        if walk.lane == QUEUED:
            self._recent_s += 0.2 * (walk.draw_s / len(walk.jobs) - self._recent_s)
        for job, result in zip(walk.jobs, results, strict=True):
            self._lines[walk.lane].charge(job.client, walk.draw_s / len(walk.jobs))
            if job.cancelled:
                continue
            seconds = {"queue": walk.queue_s[job], **result.timings, "draw": walk.draw_s}
            self._metrics.drew(job.model, seconds, len(result.images))
            self._tell(job, Done(result.images, result.request, walk.drawer.name, seconds, pictures))

    def _broke(self, walk: Walk, error: Exception) -> None:
        """One that fails alone has failed; a batch that does is drawn again one by one, so that it harms no other."""
        jobs = [job for job in walk.jobs if not job.cancelled]
        if len(walk.jobs) == 1 or not jobs:
            self._end(walk, error)
            return
        _log.warning("a batch of %d failed (%s); its jobs are drawn one by one", len(walk.jobs), error)
        self._batching.learn(_kind(walk.jobs[0]), sum(job.samples for job in walk.jobs), math.inf)
        del self._walks[walk.lane]
        for job in jobs:
            alone = Walk(walk.lane, walk.drawer, [job])
            alone.queue_s = {job: walk.queue_s[job]}
            self._walks[walk.lane] = alone
            while self._walks.get(walk.lane) is alone:
                self._end(alone, None) if job.cancelled else self._step(alone)

    def _end(self, walk: Walk, error: Exception | None) -> None:
        """Gives a walk up; error None: it was cancelled."""
        del self._walks[walk.lane]
        walk.close()
        for job in walk.jobs:
            self._lines[walk.lane].charge(job.client, walk.draw_s / len(walk.jobs))
            if error is not None and not job.cancelled:
                self._fail(job, error, walk)

    def _fail(self, job: Job, error: Exception, walk: Walk | None = None) -> None:
        self._metrics.error(type(error).__name__)
        if not isinstance(error, VegaEdgeError):
            _log.error("a job failed on a defect", exc_info=error)
        queue_s = walk.queue_s[job] if walk else time.monotonic() - job.submitted
        self._tell(job, Failed(error, queue_s, walk.draw_s if walk else 0.0))

    @staticmethod
    def _tell(job: Job, event: Any) -> None:
        try:
            job.listener(event)
        except Exception:  # such as an event loop that is closed already: not the device's concern
            _log.exception("a job's listener failed")


def _kind(job: Job) -> tuple[object, ...]:
    """What the time of a picture depends on."""
    assert job.request is not None
    return job.model, job.request.width, job.request.height, job.request.guidance > 1, job.request.scheduler
