"""The WebSocket of the live page: what is typed is drawn, and a newer request cancels the older at its next step.

Text messages are JSON objects with a "type"; a picture is one binary message: four bytes of length (big endian), that
much JSON, then the file.

    to us    hello (key)                          first, where the server asks for keys
             draw (id, prompt, and the fields of the API; slot a|b, previews off|auto|on, format jpeg|webp)
             stop (slot)
    from us  ready (models, schedulers)           after hello, or at once
             waiting (id, ahead)                  others are being drawn for
             preview, picture                     binary; id, slot, index, total, seed, seconds, parameters
             error (id, error)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
from collections import deque
from typing import Any

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from .. import __version__
from ..errors import UsageError, VegaEdgeError
from ..runtime.schedulers import all_schedulers
from .catalog import Entry, live_models, own_parameters
from .guard import BAD_KEY
from .images import encode, encode_preview
from .job import Done, Event, Failed, Job, Stepped, Stopping
from .params import read
from .service import DEFECT, Service

HELLO_S = 10.0
WAITING_S = 0.4  # before a page is told that it waits
SLOTS = ("a", "b")
_OUTBOX = 16  # messages; a browser that reads too slowly loses the oldest ones
_PREVIEWS = ("off", "auto", "on")
_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
_numbers = itertools.count(1)


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    open_now: set[Socket] = set()
    service.metrics.watch("live_sockets", "Live pages that are connected.", lambda: len(open_now))

    @routes.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        if len(open_now) >= service.settings.sockets:
            text = f"{len(open_now)} live pages are open, which is the most; try again later"
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await socket.send_json({"type": "error", "id": None, "error": text})
                await socket.close(1013)
            return
        one = Socket(service, socket)
        open_now.add(one)
        try:
            await one.serve()
        finally:
            open_now.discard(one)

    return routes


class Socket:
    """One browser. Its jobs share the device as those of one client."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._client = f"{socket.scope['client_name']}#{next(_numbers)}"
        self._owner: str | None = None  # of its key
        self._entries = {r.name: Entry(r.name, r, own_parameters(r), {}) for r in live_models(service.entries.values())}
        self._jobs: dict[str, Job] = {}
        self._outbox: deque[tuple[Job | None, Any]] = deque(maxlen=_OUTBOX)
        self._to_send = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        sender = asyncio.create_task(self._send())
        try:
            if await self._may_come_in():
                self._say(self._ready())
                while True:
                    await self._receive()
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: closed from our side meanwhile
            pass
        finally:
            for job in self._jobs.values():
                self._service.worker.cancel(job)
            sender.cancel()

    async def _may_come_in(self) -> bool:
        """The key is the first message, since a browser can't set a header here."""
        keys = self._service.keys
        if keys is None:
            return True
        try:
            message = _parse(await asyncio.wait_for(self._socket.receive(), HELLO_S))
            key = str(message.get("key", "")) if message.get("type") == "hello" else ""
        except (asyncio.TimeoutError, UsageError):
            key = ""
        owner = keys.owner(key)
        if owner is None:
            await self._socket.send_json({"type": "error", "id": None, "error": BAD_KEY})
            await self._socket.close(4401)
            return False
        self._owner, self._client = owner, f"key:{owner}#{next(_numbers)}"
        return True

    def _ready(self) -> dict[str, Any]:
        models = [
            {"name": e.recipe.name, "title": e.recipe.title, "parameters": e.parameters}
            for e in self._entries.values()
        ]  # fmt: skip
        return {"type": "ready", "version": __version__, "models": models, "schedulers": _scheduler_names()}

    async def _receive(self) -> None:
        message: dict[str, Any] = {}
        try:
            message = _parse(await self._socket.receive())
            kind = message.get("type")
            if kind == "draw":
                self._draw(message)
            elif kind == "stop":
                self._stop(_one_of(message, "slot", SLOTS))
            elif kind != "hello":
                raise UsageError(f"type: must be draw, stop or hello, got {str(kind)[:40]!r}")
        except VegaEdgeError as error:
            self._say({"type": "error", "id": _number(message), "error": str(error)})

    def _draw(self, message: dict[str, Any]) -> None:
        wait_s = self._service.rate.take(self._owner) if self._owner else 0.0
        if wait_s:
            raise UsageError(self._service.rate.refusal(wait_s))
        slot, previews = _one_of(message, "slot", SLOTS), _one_of(message, "previews", _PREVIEWS, "auto")
        kind = _FORMATS[_one_of(message, "format", tuple(_FORMATS))]
        self._stop(slot)
        name = message.get("model") or next(iter(self._entries), None)
        if not isinstance(name, str) or name not in self._entries:
            raise UsageError(f"model: must be one of {', '.join(self._entries) or 'none: no model has a bundle here'}")
        settings = self._service.settings
        asked = read(message, self._entries[name], "local", settings.prompt_chars)
        loop = asyncio.get_running_loop()
        facts = {"id": _number(message), "slot": slot}
        job = Job(self._client, name, asked.prompt, {**asked.options, "samples": 1}, lambda event: None, True, previews)
        late = loop.call_later(WAITING_S, self._tell_waiting, job, facts)

        def listener(event: Event) -> None:  # on the device's thread
            loop.call_soon_threadsafe(self._hear, job, facts, kind, event, late)

        job.listener = listener
        self._jobs[slot] = job
        try:
            self._service.worker.submit(job)
        except VegaEdgeError:
            late.cancel()
            raise

    def _tell_waiting(self, job: Job, facts: dict[str, Any]) -> None:
        if not job.cancelled:
            self._say({"type": "waiting", **facts, "ahead": max(0, self._service.worker.waiting - 1)}, job)

    def _stop(self, slot: str) -> None:
        job = self._jobs.pop(slot, None)
        if job is not None:
            self._service.worker.cancel(job)

    def _hear(self, job: Job, facts: dict[str, Any], kind: str, event: Event, late: asyncio.TimerHandle) -> None:
        """On the event loop, in the order in which the device said it."""
        late.cancel()
        if job.cancelled:
            return
        if isinstance(event, Stepped) and event.preview is not None:
            head = {"type": "preview", **facts, "index": event.index, "total": event.total}
            self._say((head, functools.partial(encode_preview, event.preview)), job)
        elif isinstance(event, Done):
            self._say(
                (_picture(facts, event, kind), lambda: encode(event.images[0], event.request, event.model, 0, kind)),
                job,
            )
        elif isinstance(event, Failed) and not isinstance(event.error, Stopping):
            text = str(event.error) if isinstance(event.error, VegaEdgeError) else DEFECT
            self._say({"type": "error", **facts, "error": text})

    def _say(self, message: Any, job: Job | None = None) -> None:
        self._outbox.append((job, message))
        self._to_send.set()

    async def _send(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await self._to_send.wait()
                self._to_send.clear()
                while self._outbox:
                    job, message = self._outbox.popleft()
                    if job is not None and job.cancelled:
                        continue  # nobody wants it any more
                    if isinstance(message, dict):
                        await self._socket.send_json(message)
                        continue
                    head, make = message
                    data = await asyncio.to_thread(make)
                    text = json.dumps(head).encode()
                    await self._socket.send_bytes(len(text).to_bytes(4, "big") + text + data)


def _picture(facts: dict[str, Any], done: Done, kind: str) -> dict[str, Any]:
    return {
        "type": "picture", **facts, "seed": done.request.seed, "media": "image/jpeg" if kind == "JPEG" else "image/webp",
        "width": done.request.width, "height": done.request.height, "steps": done.request.steps,
        "scheduler": done.request.scheduler, "seconds": {k: round(v, 4) for k, v in done.seconds.items()},
        "parameters": done.request.parameters(done.model, __version__),
    }  # fmt: skip


def _parse(received: Any) -> dict[str, Any]:
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1006))
    text = received.get("text")
    if text is None:
        raise UsageError("messages must be text, got bytes")
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UsageError("the message is not JSON") from None
    if not isinstance(message, dict):
        raise UsageError("the message must be a JSON object with a type")
    return message


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _one_of(message: dict[str, Any], name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
    value = message.get(name, default or allowed[0])
    if value not in allowed:
        raise UsageError(f"{name}: must be one of {', '.join(allowed)}, got {str(value)[:40]!r}")
    return str(value)


def _number(message: dict[str, Any]) -> int | None:
    value = message.get("id")
    return value if isinstance(value, int) and abs(value) < 2**53 else None


def _scheduler_names() -> list[str]:
    return list(dict.fromkeys(row.name for row in all_schedulers()))
