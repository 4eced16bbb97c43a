"""v2 jobs between the event loop, the worker and the store: accepted, drawn once, kept for a while."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import VegaEdgeError
from .images import encode
from .job import DEFECT, Done, Event, Failed, Job, Started, Stopping
from .metrics import Metrics
from .params import Asked
from .record import COMPLETED, FAILED, QUEUED, Record
from .refused import Refused
from .store import Store, StoreError, Taken
from .telling import told
from .worker import Worker

_log = logging.getLogger(__name__)
_HOUSEKEEPING_S = 60.0
_RETRY_S = 5.0
_LOOK_S = 0.2  # how often the jobs of another server are looked at by a poll that is held
_BEGIN_S = 5.0  # how long a drawing waits until it is on disk that it begins
T = TypeVar("T")


class JobQueue:
    """For one event loop. models: the names a job on disk may still be for."""

    def __init__(self, store: Store, worker: Worker, metrics: Metrics, keep_s: float, models: Iterable[str]) -> None:
        self._store, self._worker, self._metrics, self._keep_s = store, worker, metrics, keep_s
        self._models = set(models)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._changed: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._lost: dict[str, str] = {}  # why a job has failed that the disk knows nothing of
        self._opened = False
        self._refused = Refused(keep_s)
        self.failure: str | None = "not open yet"
        self._taken = False  # another server accepts jobs

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._open()
        self._keep(self._housekeeping())

    async def _open(self) -> None:
        """Where it fails now it is tried again: what keeps a server from its disk often passes."""
        try:
            await self._on_disk(self._store.open)
            waiting = await self._on_disk(self._store.recover)
        except StoreError as error:
            self._refuse(error)
            return
        self._opened, self._taken, self.failure = True, False, None
        if self._store.set_aside:
            _log.error("the database of jobs was damaged; it is kept as %s, a new one is begun", self._store.set_aside)
        for record in waiting:
            await self._resume(record)
        if waiting:
            _log.info("%d jobs from before are drawn now", len(waiting))

    def _refuse(self, error: StoreError) -> None:
        """No new jobs, until the disk takes them again, or the server that takes them ends."""
        if str(error) != self.failure:
            _log.error("v2 jobs are not accepted now: %s", error)
        self.failure, self._taken = str(error), isinstance(error, Taken)

    async def _resume(self, record: Record) -> None:
        if record.model not in self._models:
            await self._give_up(record.id, f"there is no model {record.model} any more")
            return
        job = self._job(record)
        job.alone = record.attempts > 0
        with contextlib.suppress(Stopping):  # then it stays on disk
            self._worker.submit(job, beyond_limit=True)

    async def submit(self, asked: Asked, model: str, client: str) -> str:
        """The new job's id. Overloaded where the queue is full, StoreError where it can't be kept, Taken where another
        server accepts them."""
        self._require_disk()
        self._worker.require_room(client)  # so that a refusal costs the disk nothing
        record = self._new(asked.prompt, asked.options, model, client, base64=asked.base64)
        record = replace(record, adjusted=asked.adjusted)
        await self._write_down(self._store.add, record)
        try:
            self._worker.submit(self._job(record))
        except VegaEdgeError:
            del self._changed[record.id]
            await self._write_down(self._store.drop, record.id)
            raise
        return record.id

    def submit_failed(self, error: str, model: str, client: str) -> str:
        """A job that is FAILED from the start: the API checks parameters after it has accepted a job."""
        self._require_disk()
        record = replace(self._new("", {"samples": 0}, model, client), status=FAILED, error=error)
        self._refused.add(record)
        return record.id

    def _require_disk(self) -> None:
        if self.failure is not None:
            raise (Taken if self._taken else StoreError)(self.failure)

    def _new(self, prompt: str, options: Any, model: str, client: str, *, base64: bool = False) -> Record:
        files = [f"{secrets.token_urlsafe(24)}.jpeg" for _ in range(int(options.get("samples", 1)))]
        return Record(uuid.uuid4().hex, QUEUED, 0, client, model, prompt, options, base64, files, None, {}, time.time())

    async def get(self, job: str, hold_s: float = 0.0) -> Record | None:
        """A job as it is now, or as soon as it has ended, but after `hold_s` at the latest."""
        record = await self._read(job)
        if record is None or record.status in (COMPLETED, FAILED) or hold_s <= 0 or self._stopping.is_set():
            return record
        changed = self._changed.get(job)
        if changed is not None:
            waits = [asyncio.ensure_future(event.wait()) for event in (changed, self._stopping)]
            await asyncio.wait(waits, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        elif self._taken:
            return await self._watch(job, hold_s)
        return await self._read(job)

    async def _watch(self, job: str, hold_s: float) -> Record | None:
        """Another server's job, as `get` gives it."""
        end = time.monotonic() + hold_s
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), max(min(_LOOK_S, end - time.monotonic()), 0.0))
            record = await self._read(job)
            ended = record is None or record.status in (COMPLETED, FAILED)
            if ended or self._stopping.is_set() or time.monotonic() >= end:
                return record

    async def _read(self, job: str) -> Record | None:
        if (refused := self._refused.get(job)) is not None:
            return refused
        record = await self._on_disk(self._store.get, job)
        if record is not None and job in self._lost:
            record = replace(record, status=FAILED, error=self._lost[job])
        return record

    def _job(self, record: Record) -> Job:
        loop = self._loop
        assert loop is not None
        self._changed[record.id] = asyncio.Event()

        def listener(event: Event) -> None:  # on the device's thread
            if isinstance(event, Started):
                self._begin(record.id)
            if not isinstance(event, (Done, Failed)):
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended before the device did
                loop.call_soon_threadsafe(lambda: self._keep(self._hear(record, event)))

        return Job(record.client, record.model, record.prompt, record.options, listener)

    def _begin(self, job: str) -> None:
        """On the device's thread, which waits: a job that ends the process must be known to have been tried."""
        try:
            self._disk.submit(self._store.begin, job).result(_BEGIN_S)
        except (StoreError, FutureTimeout, RuntimeError) as error:  # RuntimeError: the server has ended
            _log.error("job %s is drawn, and it is not on disk that it is: %s", job, error or "the disk is too slow")

    async def _hear(self, record: Record, event: Event) -> None:
        try:
            await self._write_down(self._write, record, event)
        except StoreError as error:
            _log.error("job %s: %s", record.id, error)
            self._metrics.error("StoreError")
            await self._give_up(record.id, f"the picture could not be kept: {told(error)}")
        except Exception as error:  # or its client would ask for ever
            _log.exception("job %s failed on a defect as its picture was kept", record.id)
            self._metrics.error(type(error).__name__)
            await self._give_up(record.id, DEFECT)
        self._changed.pop(record.id, asyncio.Event()).set()

    def _write(self, record: Record, event: Event) -> None:
        total = round(time.time() - record.created, 4)
        if isinstance(event, Done):
            start = time.perf_counter()
            for i, (name, image) in enumerate(zip(record.files, event.images, strict=True)):
                self._store.save(name, encode(image, event.request, event.model, i))
            self._metrics.stage(record.model, "encode", time.perf_counter() - start)
            self._metrics.stage(record.model, "total", total)
            taken = {"inference_time": event.seconds["draw"], "queue_time": event.seconds["queue"]}
            adjusted = [*record.adjusted, *event.cut_off]
            self._store.complete(record.id, {**_rounded(taken), "total_time": total}, adjusted)
        elif isinstance(event, Failed) and isinstance(event.error, Stopping):
            self._store.put_back(record.id)
        elif isinstance(event, Failed):
            text = DEFECT
            if isinstance(event.error, VegaEdgeError):
                text = told(event.error)
                _log.warning("job %s failed: %s", record.id, event.error)
            taken = {"inference_time": event.draw_s, "queue_time": event.queue_s}
            self._store.fail(record.id, text, {**_rounded(taken), "total_time": total})

    async def _give_up(self, job: str, error: str) -> None:
        """If the disk does not even take that, it is remembered here until it does."""
        try:
            await self._write_down(self._store.fail, job, error, {})
        except StoreError:
            self._lost[job] = error

    async def _housekeeping(self) -> None:
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(min(_RETRY_S, _HOUSEKEEPING_S))
            if not self.failure and time.monotonic() - tidied < _HOUSEKEEPING_S:
                continue
            try:
                if self._opened:
                    await self._heal()
                    await self._tidy()
                else:
                    await self._open()
            except StoreError as error:
                self._refuse(error)
            except Exception as error:  # whatever it is, the next time is worth a try
                _log.error("the jobs on disk could not be looked after: %s", error)
            tidied = time.monotonic()

    async def _heal(self) -> None:
        """Jobs are accepted again where the disk takes what one needs."""
        if self.failure:
            await self._on_disk(self._store.probe)
            self.failure = None
            _log.warning("v2 jobs are accepted again")

    async def _tidy(self) -> None:
        await self._on_disk(self._store.expire, time.time() - self._keep_s)
        for job, error in list(self._lost.items()):
            await self._on_disk(self._store.fail, job, error, {})
            del self._lost[job]

    def release_polls(self) -> None:
        """Answers every poll that is held open."""
        self._stopping.set()

    async def stop(self) -> None:
        """After the worker has ended: writes down the last of what it said."""
        await asyncio.sleep(0)  # what the worker's thread has scheduled
        tasks = [task for task in self._tasks if task.get_coro().__name__ != "_housekeeping"]  # type: ignore[union-attr]
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await self._on_disk(self._store.close)
        self._disk.shutdown()

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write_down(self, call: Callable[..., T], *arguments: Any) -> T:
        """As `_on_disk`, of what new jobs need too: where it fails they are refused, rather than drawn and lost."""
        try:
            return await self._on_disk(call, *arguments)
        except StoreError as error:
            self._refuse(error)
            raise

    async def _on_disk(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, functools.partial(call, *arguments))


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}
