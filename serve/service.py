"""What the routes share, put together once for a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from ..errors import NotEnoughMemoryError, UsageError, VegaEdgeError
from ..models import Recipe, find_bundle
from ..runtime.memory import weight_bytes
from ..runtime.parts import check_opening
from ..runtime.pipeline import Pipeline
from .catalog import Entry, catalog
from .job import DEFECT, Done, Event, Failed, Job, Overloaded, Stopping, TookTooLong
from .keys import KeyFile
from .metrics import Metrics
from .params import BadBody
from .queue import JobQueue
from .rate import Rate
from .residents import Drawer, Residents
from .settings import BODY_BYTES, BODY_S, Settings
from .store import Store, StoreError, Taken
from .telling import not_now
from .worker import Worker

_log = logging.getLogger(__name__)


class NotFound(VegaEdgeError):
    pass


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Service:
    settings: Settings
    entries: Mapping[str, Entry]
    metrics: Metrics
    residents: Residents
    worker: Worker
    queue: JobQueue
    keys: KeyFile | None
    rate: Rate
    stopping: bool = False

    def entry(self, slug: str) -> Entry:
        """NotFound for a slug that nobody knows, or whose model is not here."""
        if slug not in self.entries:
            raise NotFound(f"unknown model {slug[:80]!r}; there are: {', '.join(sorted(self.entries))}")
        entry = self.entries[slug]
        try:
            entry.require_ready()
        except VegaEdgeError as error:
            raise NotFound(str(error)) from error
        return entry

    def charge(self, client: str, options: Mapping[str, Any]) -> None:
        """Of several samples each one counts against a key's rate; the first was counted as the request came."""
        self.rate.charge(client.removeprefix("key:"), int(options.get("samples", 1)) - 1)

    async def draw(self, job: Job, left: asyncio.Future[Any]) -> Done:
        """Waits until it is drawn; raises what it failed with, or ClientLeft where `left` is done before."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Event] = loop.create_future()

        def settle(event: Event) -> None:
            if not ended.done():
                ended.set_result(event)

        def listener(event: Event) -> None:  # on the device's thread
            if isinstance(event, (Done, Failed)):
                loop.call_soon_threadsafe(settle, event)

        job.listener = listener
        self.worker.submit(job)
        try:
            await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not ended.done():
                self.worker.cancel(job)
        if not ended.done():
            raise ClientLeft
        event = ended.result()
        if isinstance(event, Failed):
            raise event.error if isinstance(event.error, VegaEdgeError) else VegaEdgeError(DEFECT) from event.error
        assert isinstance(event, Done)
        return event


def build(settings: Settings, open_model: Callable[[str], Drawer] | None = None) -> Service:
    """open_model: what opens a model by name; the runtime's pipelines, if not said."""
    check_opening(settings.engine, settings.memory, settings.vae, settings.device)
    metrics = Metrics()
    entries = catalog(settings.aliases)
    recipes: dict[str, Recipe] = {entry.recipe.name: entry.recipe for entry in entries.values()}
    for name in settings.preload:
        if name not in entries:
            raise UsageError(f"--preload: unknown model {name!r}; there are: {', '.join(sorted(entries))}")
        entries[name].require_ready()
    for name in settings.loras:
        model = settings.aliases.get(name, name)
        if model != name:
            raise UsageError(
                f"--lora: {name} is an alias here, for {model}; give the LoRA to that: --lora {model}=FILE"
            )
        if name not in recipes:
            raise UsageError(f"--lora: unknown model {name!r}; there are: {', '.join(sorted(recipes))}")
    if missing := [file for loras in settings.loras.values() for file, _ in loras if not file.is_file()]:
        raise UsageError(f"--lora: {missing[0]} is not a file")
    residents = Residents(
        open_model or (lambda name: open_pipeline(name, settings)),
        lambda name: _bytes_of(name, settings.memory == "low"),
        settings.memory_budget,
        metrics.swap,
    )
    worker = Worker(residents, metrics, queue=settings.queue, job_s=settings.job_s, batch=settings.batch)
    for name in settings.preload:
        residents.require_size(entries[name].recipe.name)
    queue = JobQueue(Store(settings.data), worker, metrics, settings.keep_s, recipes)
    keys = KeyFile(settings.api_keys) if settings.api_keys else None
    metrics.watch("queue_length", "Jobs that wait.", lambda: worker.waiting)
    metrics.watch("models_open", "Models that are open.", lambda: len(residents.names))
    metrics.watch("models_bytes", "Size of the open models' graphs.", lambda: residents.bytes)
    return Service(settings, entries, metrics, residents, worker, queue, keys, Rate(settings.rate))


def open_pipeline(model: str, settings: Settings) -> Drawer:
    return Pipeline.open(
        model, settings.engine, memory=settings.memory, vae=settings.vae, device=settings.device,
        loras=settings.loras.get(model, ()),
    )  # fmt: skip


def _bytes_of(model: str, low_memory: bool) -> int:
    """What the memory budget counts: all its graphs, or where they are opened one after another the largest one."""
    sizes = weight_bytes(find_bundle(model)).values()
    return max(sizes, default=0) if low_memory else sum(sizes)


def status_of(error: Exception) -> tuple[int, dict[str, str]]:
    """The HTTP status and headers that an error is answered with."""
    if isinstance(error, BadBody):
        return error.status, {}
    if isinstance(error, UsageError):
        return 400, {}
    if isinstance(error, NotFound):
        return 404, {}
    if isinstance(error, Overloaded):
        return 429, not_now(error.retry_s)
    if isinstance(error, Taken):  # a load balancer tries the other server
        return 503, {"retry-after": "5"}
    if isinstance(error, StoreError):  # not now: it is tried again every few seconds
        return 429, not_now(5)
    if isinstance(error, Stopping):
        return 503, {"retry-after": "5"}
    if isinstance(error, NotEnoughMemoryError):  # of this machine, now
        return 503, {}
    if isinstance(error, TookTooLong):
        return 422, {}
    return 500, {}


async def read_body(request: HttpRequest) -> bytes:
    """At most BODY_BYTES, within BODY_S; ClientLeft where it ends before its end."""
    length = request.headers.get("content-length", "")
    too_long = BadBody(f"the body is longer than {BODY_BYTES} bytes", 413)
    if length.isdecimal() and int(length[:20]) > BODY_BYTES:
        raise too_long

    async def whole() -> bytes:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES:
                raise too_long
        return body

    try:
        return await asyncio.wait_for(whole(), BODY_S)
    except ClientDisconnect:
        raise ClientLeft from None
    except asyncio.TimeoutError:
        raise BadBody(f"the body did not arrive within {BODY_S:g} s", 408) from None
