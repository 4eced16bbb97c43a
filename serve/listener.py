"""The HTTP server itself: uvicorn, with patience for slow connections, and a stop that the service hears of first."""

from __future__ import annotations

import asyncio
import json
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import VegaEdgeError
from .app import begin_stop, make_app
from .service import Service
from .settings import BODY_BYTES

HEAD_S = 10.0  # a connection that has not sent a request's head by then is closed


class PatientProtocol(H11Protocol):
    """uvicorn waits for ever for the head of a request; this does not. `most` connections at a time."""

    most = 512
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            body = json.dumps({"error": f"more than {self.most} connections"}).encode()
            head = f"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            transport.write(head.encode() + body)
            transport.close()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # a WebSocket's from now on, which may be silent
        if upgraded or (self.cycle is not None and not self.cycle.response_complete):
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
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> socket.socket:
    """`::` is every address, of both kinds. VegaEdgeError where it is taken or is not one of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise VegaEdgeError(f"can't listen on {host}:{port} ({error}); choose another --port or --host") from error


def addresses(listening: socket.socket, host: str) -> list[str]:
    """Where it can be called: from this machine, and where it listens on every address also from others."""
    port = listening.getsockname()[1]
    if host in ("", "0.0.0.0", "::"):
        names = ["localhost", socket.gethostname()]
    elif host in ("127.0.0.1", "::1"):
        names = ["localhost"]
    else:
        names = [f"[{host}]" if ":" in host else host]
    return [f"http://{name}:{port}/" for name in names]


class Server(uvicorn.Server):
    def __init__(self, service: Service) -> None:
        settings = service.settings
        self._service = service
        protocol = type("Protocol", (PatientProtocol,), {"most": settings.connections})
        super().__init__(
            uvicorn.Config(
                make_app(service), host=settings.host, port=settings.port, http=protocol, ws="websockets-sansio",
                ws_max_size=BODY_BYTES, ws_max_queue=4, ws_per_message_deflate=False, access_log=False, log_config=None, proxy_headers=False,
                server_header=False, timeout_keep_alive=15, timeout_graceful_shutdown=int(settings.grace_s) + 5,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        begin_stop(self._service)
        super().handle_exit(sig, frame)
