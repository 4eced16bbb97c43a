"""A walk under way, a step at a time, with its clock and its previews."""

from __future__ import annotations

import time
from typing import Any

from PIL import Image

from .job import Job
from .residents import Drawer


class Walk:
    """For one or more jobs in one batch. draw_s: device time so far, without what others took in between."""

    def __init__(self, lane: str, drawer: Drawer, jobs: list[Job]) -> None:
        self.lane, self.drawer, self.jobs = lane, drawer, jobs
        self.model = jobs[0].model
        self.queue_s = {job: time.monotonic() - job.submitted for job in jobs}
        self.draw_s = 0.0
        self.index, self.total = 0, None
        self.preview: Image.Image | None = None
        self._preview_s: float | None = None
        self._steps: Any = drawer.draw([job.request for job in jobs])

    def advance(self) -> list[Any] | None:
        """One step; at the end a result for each job."""
        start = time.perf_counter()
        try:
            step = next(self._steps)
            self.index, self.total = step.index, step.total
            self.preview = self._look(step, time.perf_counter() - start)
        except StopIteration as end:
            results: list[Any] = end.value
            return results
        finally:
            self.draw_s += time.perf_counter() - start
        return None

    def _look(self, step: Any, step_s: float) -> Image.Image | None:
        """A preview where one is wanted. "auto": the first, which is what the eye waits for, and then those that cost
        less than half a step."""
        wanted = self.jobs[0].previews
        last = step.total is not None and step.index >= step.total
        if wanted == "off" or last:
            return None
        if wanted == "auto" and self._preview_s is not None and self._preview_s > step_s / 2:
            return None
        start = time.perf_counter()
        image: Image.Image = step.preview()[0]
        self._preview_s = time.perf_counter() - start
        return image

    def close(self) -> None:
        self._steps.close()
