"""What becomes of jobs whose turn it is: a walk for one or for several that are alike, a step at a time, to its end.

Knows no order between the lanes: `worker.py` says whose turn it is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..errors import VegaEdgeError
from ..runtime.request import alike
from .batching import Batching
from .job import Done, Failed, Job, Started, Stepped, TookTooLong
from .line import Line
from .metrics import Metrics
from .residents import Drawer, Residents
from .walking import Walk

_log = logging.getLogger(__name__)
LIVE, QUEUED = "live", "queued"


class Drawing:
    """For the device's thread alone. lines: of waiting jobs by lane, which other threads change under `lock`.

    walks: those under way, by lane. opening: the job whose model is being opened. recent_s: device time of a queued
    picture, smoothed.
    """

    def __init__(
        self, residents: Residents, metrics: Metrics, lines: Mapping[str, Line], lock: threading.Condition, *,
        job_s: float, batch: int,
    ) -> None:  # fmt: skip
        self._residents, self._metrics, self._lines, self._lock = residents, metrics, lines, lock
        self._job_s, self._batching = job_s, Batching(batch)
        self.walks: dict[str, Walk] = {}
        self._opening: list[Job] = []
        self.recent_s = 1.0

    @property
    def now(self) -> list[Job]:
        """What the device is at and somebody still wants. From any thread."""
        drawn = [job for walk in list(self.walks.values()) for job in walk.jobs]
        return [job for job in self._opening + drawn if not job.cancelled]

    def turn(self, lane: str) -> None:
        """Begins a walk in the lane, or goes one step on with it."""
        walk = self.walks.get(lane)
        if walk is None:
            self._begin(lane)
        elif all(job.cancelled for job in walk.jobs):
            self.end(walk, None)
        else:
            self._step(walk)

    def _begin(self, lane: str) -> None:
        line = self._lines[lane]
        with self._lock:
            job = line.first()
            if job is None or not line.remove(job):  # cancelled meanwhile
                return
            self._opening = [job]
        self._start(job)  # before a model is opened, which may end the process
        kept = [walk.model for walk in self.walks.values()]
        jobs = [job]
        try:
            drawer = self._residents.get(job.model, kept)
            job.request = drawer.request(job.prompt, **job.options)
            jobs += self._companions(line, drawer, job)
            self.walks[lane] = Walk(lane, drawer, jobs)
        except BaseException as error:  # libraries in Rust raise such ones when they panic
            for each in jobs:
                self._fail(each, error)
            return
        finally:
            self._opening = []
        for other in jobs[1:]:
            self._start(other)

    def _start(self, job: Job) -> None:
        if not job.started:
            job.started = True
            self.tell(job, Started(time.monotonic() - job.submitted))

    def _companions(self, line: Line, drawer: Drawer, job: Job) -> list[Job]:
        """Waiting jobs to draw in the same batch: those that are alike, as many as are worth it."""
        if job.live or job.alone:
            return []
        assert job.request is not None
        with self._lock:
            others = [other for other in line.in_order() if other.model == job.model and not other.alone]
        found, total, sizes = [], job.samples, [job.samples]
        for other in others:
            if total + other.samples > self._batching.most:
                continue
            try:
                other.request = other.request or drawer.request(other.prompt, **other.options)
            except Exception:
                continue  # it is told when its turn comes
            if alike(job.request, other.request):
                found.append(other)
                total += other.samples
                sizes.append(total)
        best = self._batching.best(_kind(job), sizes)
        with self._lock:
            return [other for other, size in zip(found, sizes[1:], strict=True) if size <= best and line.remove(other)]

    def _step(self, walk: Walk) -> None:
        try:
            done = walk.advance()
        except BaseException as error:
            self._broke(walk, error)
            return
        if done is not None:
            self._finish(walk, done)
            return
        for job in walk.jobs:
            if not job.cancelled:
                self.tell(job, Stepped(walk.index, walk.total, walk.preview))
        if walk.draw_s > self._job_s:
            text = f"drawing took longer than the limit of {self._job_s:g} s; ask for fewer steps or a smaller picture"
            self.end(walk, TookTooLong(text))

    def _finish(self, walk: Walk, results: list[Any]) -> None:
        pictures = sum(len(result.images) for result in results)
        self._metrics.batch(pictures)
        if walk.lane == QUEUED:  # a live walk's time has its previews in it
            self._batching.learn(_kind(walk.jobs[0]), pictures, walk.draw_s)
            self.recent_s += 0.2 * (walk.draw_s / len(walk.jobs) - self.recent_s)
        for job, result in zip(walk.jobs, results, strict=True):
            self._charge(job, walk)
            if job.cancelled:
                continue
            seconds = {"queue": walk.queue_s[job], **result.timings, "draw": walk.draw_s}
            self._metrics.drew(job.model, seconds, len(result.images))
            name, unread = walk.drawer.name, tuple(result.unread)
            self.tell(job, Done(result.images, result.request, name, seconds, pictures, unread))
        del self.walks[walk.lane]  # last: after a defect in the above its jobs are still known

    def _broke(self, walk: Walk, error: BaseException) -> None:
        """One that fails alone has failed; those of a batch that does go back, to be drawn alone, so that a bad one harms
        no other."""
        jobs = [job for job in walk.jobs if not job.cancelled]
        if len(walk.jobs) == 1 or not jobs:
            self.end(walk, error)
            return
        _log.warning("a batch of %d failed (%s); its jobs are drawn one by one", len(walk.jobs), error)
        self._batching.learn(_kind(walk.jobs[0]), sum(job.samples for job in walk.jobs), math.inf)
        self.end(walk, None)
        with self._lock:
            for job in reversed(jobs):
                job.alone = True
                if not job.cancelled:
                    self._lines[walk.lane].put_back(job)

    def abandon(self, lane: str, error: BaseException) -> None:
        """After a defect of ours: the lane's walk has failed, and the next one may begin."""
        walk = self.walks.get(lane)
        if walk is not None:
            self.end(walk, error)

    def end(self, walk: Walk, error: BaseException | None) -> None:
        """Gives a walk up; error None: it was cancelled."""
        del self.walks[walk.lane]
        try:
            walk.close()
        except Exception:  # what it holds is the engine's concern; the jobs are told all the same
            _log.exception("a walk failed as it was given up")
        for job in walk.jobs:
            self._charge(job, walk)
            if error is not None and not job.cancelled:
                self._fail(job, error, walk)

    def _charge(self, job: Job, walk: Walk) -> None:
        with self._lock:
            self._lines[walk.lane].charge(job.client, walk.draw_s / len(walk.jobs))

    def _fail(self, job: Job, error: BaseException, walk: Walk | None = None) -> None:
        self._metrics.error(type(error).__name__)
        if not isinstance(error, VegaEdgeError):
            _log.error("a job failed on a defect", exc_info=error)
        queue_s = walk.queue_s[job] if walk else time.monotonic() - job.submitted
        self.tell(job, Failed(error, queue_s, walk.draw_s if walk else 0.0))

    @staticmethod
    def tell(job: Job, event: Any) -> None:
        try:
            job.listener(event)
        except Exception:  # such as an event loop that is closed already: not the device's concern
            _log.exception("a job's listener failed")


def _kind(job: Job) -> tuple[object, ...]:
    """What the time of a picture depends on."""
    assert job.request is not None
    r = job.request
    return job.model, r.width, r.height, r.guidance > 1, r.scheduler, r.steps
