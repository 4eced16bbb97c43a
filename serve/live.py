"""The WebSocket of the live page: what is typed is drawn, and a newer request cancels the older at its next step.

`live_messages.py` has what is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import UsageError, VegaEdgeError
from . import live_messages as messages
from .catalog import Entry, live_models, own_parameters
from .crowd import first_to_go
from .guard import BAD_KEY, write_line
from .images import MEDIA, encode, encode_preview
from .job import DEFECT, Done, Event, Failed, Job, Overloaded, Started, Stepped, Stopping
from .keys import digest_of
from .outbox import Message, Outbox
from .params import read
from .service import Service, status_of
from .telling import told

_log = logging.getLogger(__name__)
HELLO_S = 10.0
WAITING_S = 0.4  # before a page is told that it waits
NEWCOMERS = 16  # sockets that have not said hello yet
BAD_KEY_CODE, BUSY_CODE = 4401, 1013
_PREVIEWS = ("off", "auto", "on")
_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
_GONE = (WebSocketDisconnect, RuntimeError)  # RuntimeError: closed from our side meanwhile
_numbers = itertools.count(1)


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    newcomers: dict[Socket, None] = {}  # the oldest first
    inside: set[Socket] = set()
    service.metrics.watch("live_sockets", "Live pages that are connected.", lambda: len(inside))

    async def admitted(one: Socket) -> bool:
        """Those without a key must not use up the room of the pages, nor of those that are about to show theirs."""
        newcomers[one] = None
        crowd = Counter(each.address for each in newcomers)
        if len(newcomers) > NEWCOMERS and (first := first_to_go(newcomers, crowd, lambda each: each.address)):
            del newcomers[first]
            first.give_way()
        try:
            welcome = await one.may_come_in()
        finally:
            newcomers.pop(one, None)
        if welcome and len(inside) >= service.settings.sockets:
            await one.refuse(f"{len(inside)} live pages are open, which is the most; try again later", BUSY_CODE)
            return False
        return welcome

    @routes.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        one = Socket(service, socket)
        with contextlib.suppress(*_GONE):
            if not await admitted(one):
                return
            inside.add(one)
            try:
                await one.serve()
            finally:
                inside.discard(one)

    return routes


@dataclass(eq=False)
class Wish:
    """A picture that a page asked for. late: when the page is told that it waits; ahead: what it was told."""

    id: int | None
    slot: str
    kind: str
    job: Job
    late: asyncio.TimerHandle | None = None
    ahead: int | None = None
    ended: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        return {"id": self.id, "slot": self.slot}


class Socket:
    """One browser. Its jobs share the device as those of one client."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._log: dict[str, Any] = socket.scope["log"]
        self.address = str(socket.scope["client_name"])
        self._client = f"{self.address}#{next(_numbers)}"
        self._owner: str | None = None  # of its key
        self._digest = ""
        self._first: asyncio.Future[Any] | None = None
        self._entries = {r.name: Entry(r.name, r, own_parameters(r), {}) for r in live_models(service.entries.values())}
        self._wishes: dict[str, Wish] = {}
        self._outbox = Outbox()

    async def may_come_in(self) -> bool:
        """The key is the first message, since a browser can't set a header here."""
        keys = self._service.keys
        if keys is None:
            return True
        first = self._first = asyncio.ensure_future(self._socket.receive())
        try:
            await asyncio.wait({first}, timeout=HELLO_S)
            if first.cancelled():
                await self.refuse("too many pages are just connecting; try again later", BUSY_CODE)
                return False
            message = messages.parse(first.result()) if first.done() else {}
            key = str(message.get("key", "")) if message.get("type") == "hello" else ""
        except UsageError:
            key = ""
        finally:
            first.cancel()
        self._digest = digest_of(key)
        self._owner = keys.owner_of(self._digest)
        if self._owner is None:
            await self.refuse(BAD_KEY, BAD_KEY_CODE)
            return False
        self._log["client"] = f"key:{self._owner}"
        self._client = f"key:{self._owner}#{next(_numbers)}"
        return True

    def give_way(self) -> None:
        """To another newcomer, unless the key has come meanwhile."""
        if self._first is not None:
            self._first.cancel()

    async def refuse(self, text: str, code: int) -> None:
        self._log["error"] = text
        await self._socket.send_json({"type": "error", "id": None, "error": text})
        await self._socket.close(code)

    async def serve(self) -> None:
        sender = asyncio.create_task(self._send())
        slugs = {slug: entry.recipe.name for slug, entry in self._service.entries.items()}
        self._say(messages.ready(list(self._entries.values()), slugs))
        try:
            while True:
                await self._receive()
                await asyncio.sleep(0)  # or one that sends without end would not let the others speak
        finally:
            for slot in list(self._wishes):
                self._stop(slot)
            sender.cancel()

    async def _receive(self) -> None:
        message: dict[str, Any] = {}
        try:
            message = messages.parse(await self._socket.receive())
            kind = message.get("type")
            if kind == "draw":
                await self._require_key()
                self._draw(message)
            elif kind == "stop":
                self._stop(messages.one_of(message, "slot", messages.SLOTS))
            elif kind == "ping":
                self._say({"type": "pong"})
            elif kind != "hello":
                raise UsageError(f"type: must be draw, stop, ping or hello, got {str(kind)[:40]!r}")
        except VegaEdgeError as error:
            self._say(messages.fault(message, error))

    async def _require_key(self) -> None:
        """It may have been revoked since it came in."""
        keys = self._service.keys
        if keys is not None and keys.owner_of(self._digest) != self._owner:
            await self.refuse(BAD_KEY, BAD_KEY_CODE)
            raise WebSocketDisconnect(BAD_KEY_CODE)

    def _draw(self, message: dict[str, Any]) -> None:
        wait_s = self._service.rate.take(self._owner) if self._owner else 0.0
        if wait_s:
            raise Overloaded(self._service.rate.refusal(wait_s), wait_s)
        slot = messages.one_of(message, "slot", messages.SLOTS)
        previews = messages.one_of(message, "previews", _PREVIEWS, "auto")
        kind = _FORMATS[messages.one_of(message, "format", tuple(_FORMATS))]
        self._stop(slot)
        name = message.get("model") or next(iter(self._entries), None)
        if not isinstance(name, str) or name not in self._entries:
            raise UsageError(f"model: must be one of {', '.join(self._entries) or 'none: no model has a bundle here'}")
        asked = read(message, self._entries[name], "local", self._service.settings.prompt_chars)
        job = Job(self._client, name, asked.prompt, {**asked.options, "samples": 1}, lambda event: None, True, previews)
        wish = Wish(messages.number(message), slot, kind, job)
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:  # on the device's thread
            loop.call_soon_threadsafe(self._hear, wish, event)

        job.listener = listener
        self._service.worker.submit(job)
        self._wishes[slot] = wish
        self._tell_later(wish)

    def _tell_later(self, wish: Wish) -> None:
        wish.late = asyncio.get_running_loop().call_later(WAITING_S, self._tell_waiting, wish)

    def _tell_waiting(self, wish: Wish) -> None:
        ahead = self._service.worker.ahead(self._client)
        if ahead is not None and ahead != wish.ahead:
            wish.ahead = ahead
            self._outbox.put(Message({"type": "waiting", **wish.facts, "ahead": ahead}, wish.job))
        self._tell_later(wish)

    def _stop(self, slot: str) -> None:
        wish = self._wishes.pop(slot, None)
        if wish is not None:
            self._service.worker.cancel(wish.job)
            self._end(wish, 499)

    def _end(self, wish: Wish, status: int, **times: float) -> None:
        """One line of log for each picture, however it ended; 499: the page wanted something else, or left."""
        if wish.late is not None:
            wish.late.cancel()
        if wish.ended:
            return
        wish.ended = True
        prompt = {"prompt": wish.job.prompt} if self._service.settings.log_prompts else {}
        facts = {k: round(v, 3) for k, v in times.items()}
        seed = wish.job.options["seed"]
        write_line({**self._log, "path": "/live", "model": wish.job.model, "seed": seed, **prompt, **facts, "status": status})  # fmt: skip

    def _hear(self, wish: Wish, event: Event) -> None:
        """On the event loop, in the order in which the device said it."""
        if wish.late is not None:
            wish.late.cancel()
        if wish.job.cancelled:
            return
        if isinstance(event, Started) and wish.ahead is not None:
            self._outbox.put(Message({"type": "started", **wish.facts}, wish.job))
        elif isinstance(event, Stepped) and event.preview is not None:
            head = {"type": "preview", **wish.facts, "index": event.index, "total": event.total}
            self._outbox.put(Message(head, wish.job, functools.partial(encode_preview, event.preview)))
        elif isinstance(event, Done):
            self._end(wish, 200, queue_s=event.seconds["queue"], draw_s=event.seconds["draw"])
            head = messages.picture(wish.facts, event, MEDIA[wish.kind])
            make = functools.partial(encode, event.images[0], event.request, event.model, 0, wish.kind)
            self._outbox.put(Message(head, wish.job, make))
        elif isinstance(event, Failed):
            status = status_of(event.error)[0] if isinstance(event.error, VegaEdgeError) else 500
            self._end(wish, status, queue_s=event.queue_s, draw_s=event.draw_s)
            if not isinstance(event.error, Stopping):
                _log.warning("a live picture failed: %s", event.error)
                why = told(event.error) if isinstance(event.error, VegaEdgeError) else DEFECT
                self._say({"type": "error", **wish.facts, "error": why})

    def _say(self, head: dict[str, Any]) -> None:
        self._outbox.put(Message(head))

    async def _send(self) -> None:
        with contextlib.suppress(*_GONE):
            while True:
                message = await self._outbox.get()
                if message.make is None:
                    await self._socket.send_json(message.head)
                else:
                    await self._send_picture(message.head, message.make)

    async def _send_picture(self, head: dict[str, Any], make: Callable[[], bytes]) -> None:
        try:
            file = await asyncio.to_thread(make)
        except Exception:  # the pictures after it are sent all the same
            _log.exception("a picture could not be made into a file")
            if head["type"] == "picture":
                self._say({"type": "error", "id": head["id"], "slot": head["slot"], "error": DEFECT})
            return
        await self._socket.send_bytes(messages.binary(head, file))
