"""uvicorn's connections, with an end to patience: for a request's head, and for answers that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request as WebSocketRequest
from websockets.server import ServerProtocol

from .crowd import first_to_go
from .guard import write_line
from .metrics import Metrics
from .telling import not_now

_log = logging.getLogger(__name__)
_silent = logging.Logger("silent", logging.CRITICAL + 1)
HEAD_S = 10.0  # a connection that has not sent a request's head by then is closed
UNREAD_S = 30.0  # one that has taken nothing of what waits for it for so long is cut off
_SYSTEM_BYTES = 256 * 1024  # which the system holds besides; it takes more when about a third of that has gone


class UnreadDeadline(asyncio.Protocol):
    """Cuts off a client that does not read. Closing would not do: it waits until all is sent, that is for ever.

    Slow is not the same: whoever goes on taking may take as long as it likes. Comes before a protocol of uvicorn's.
    """

    transport: Any
    since = 0.0  # when it was opened, by the loop's clock
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = asyncio.get_running_loop().time()
        with contextlib.suppress(OSError):  # it is gone already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_BYTES)
        transport.set_write_buffer_limits(0)  # pause_writing as soon as anything waits, not at 64 KiB

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def connection_lost(self, error: Exception | None) -> None:
        self._read()
        super().connection_lost(error)

    def _watch(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._unread = asyncio.get_running_loop().call_later(UNREAD_S, self._look, left)

    def _look(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if 0 < before <= left:
            _log.warning(
                "a client has taken nothing for %g s of the %d bytes that wait for it; cut off", UNREAD_S, left
            )
            self.transport.abort()
        elif left:
            self._watch()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class Http(UnreadDeadline, H11Protocol):
    """`most` connections at a time. What is refused here, before there is a request, is said as the guard says it."""

    most = 512
    metrics: Metrics
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not self._make_room():
            self.refuse(429, f"more than {self.most} connections; try again later", not_now(1))
            return
        self._wait_for_head()

    @property
    def idle(self) -> bool:
        """Nothing is asked, or all is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def may_go(self) -> bool:
        """It only waits for its client: for a request, or for the rest of one."""
        return self.idle or (self.cycle.more_body and not self.cycle.response_started)

    def _make_room(self) -> bool:
        """Ends a connection that may go where there are too many, but none of an address that has fewer than ours."""
        if len(self.connections) <= self.most:
            return True
        open_now = [each for each in self.connections if not each.transport.is_closing()]
        if len(open_now) <= self.most:
            return True
        crowd = Counter(_address(each) for each in open_now)
        may_go = [
            each for each in open_now if isinstance(each, (Http, LiveSocket)) and each is not self and each.may_go
        ]
        may_go.sort(key=lambda each: (not each.idle, each.since))  # an idle one loses nothing by it
        first = first_to_go(may_go, crowd, _address)
        if first is None or crowd[_address(first)] < crowd[_address(self)]:
            return False
        if first.idle:
            first.transport.close()  # the end of its last answer may be still under way
        else:
            first.transport.abort()
        return True

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's plain text."""
        self.refuse(400, "this is not HTTP that can be read")

    def refuse(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        name, body = secrets.token_hex(8), json.dumps({"error": text}).encode()
        fields = {"content-type": "application/json", "content-length": len(body), "connection": "close",
                  "x-request-id": name, "x-content-type-options": "nosniff", **(headers or {})}  # fmt: skip
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in fields.items())]
        if self.idle or not self.cycle.response_started:  # or it would land in the middle of an answer
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
        self.metrics.response("none", status)
        write_line({"id": name, "client": _address(self), "method": "none", "path": "none", "error": text, "status": status})  # fmt: skip

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        fault = _handshake_fault(event.method, event.target, self.headers)
        if fault:
            self.refuse(*fault)
        else:
            super().handle_websocket_upgrade(event)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # a WebSocket's from now on, which may be silent
        if upgraded or not self.idle:
            self._forget()
        elif self._deadline is None and not self.transport.is_closing():
            self._wait_for_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._forget()
        super().connection_lost(error)

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self.idle:
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _handshake_fault(
    method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> tuple[int, str, dict[str, str]] | None:
    """Why a WebSocket can't be opened: status, text, headers. Asked beforehand, of the library that would open it: it
    refuses in plain text, and one with a body or too long a head not at all: that one would stay open for ever."""
    lines = [method + b" " + target + b" HTTP/1.1", *(name + b": " + value for name, value in headers), b"", b""]
    trial = ServerProtocol(logger=_silent)
    trial.receive_data(b"\r\n".join(lines))
    request = next(iter(trial.events_received()), None)
    status = trial.accept(request).status_code if isinstance(request, WebSocketRequest) else 400
    if status == 101:
        return None
    why = trial.handshake_exc and (trial.handshake_exc.__cause__ or trial.handshake_exc)
    text = (
        f"the WebSocket can't be opened: {str(why)[:200]}; ask by GET, with version 13, a key of 16 bytes and no body"
    )
    return status, text, {"allow": "GET"} if status == 405 else {"sec-websocket-version": "13"}


def _address(connection: Any) -> str:
    return str(connection.client[0]) if connection.client else "local"


class LiveSocket(UnreadDeadline, WebSocketsSansIOProtocol):
    idle = False

    @property
    def may_go(self) -> bool:
        """It was told to go, and has not answered that yet."""
        return self.close_sent

    def shutdown(self) -> None:
        """Once: uvicorn's raises where the connection is closing already, and the server would not end as it should."""
        if not self.transport.is_closing():
            super().shutdown()

    def handle_ping(self) -> None:
        """RFC 6455, 5.5.3, lets pongs be left out, or a client that pings and never reads would fill the memory."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # which takes the pong out
