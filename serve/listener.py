"""The HTTP server itself: uvicorn with our connections (`protocols.py`), and a stop that the service hears of first."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from types import FrameType

import uvicorn

from ..errors import VegaEdgeError
from .app import begin_stop, make_app
from .protocols import Http, LiveSocket
from .service import Service
from .settings import BODY_BYTES

_LAST_ANSWERS_S = 5  # for clients to take them, when the last picture is finished


def listen(host: str, port: int) -> socket.socket:
    """VegaEdgeError where it is taken or is not one of this machine."""
    try:
        return bound(host, port)
    except (OSError, ValueError) as error:
        raise VegaEdgeError(
            f"can't listen on {host}:{port} ({reason(error)}); choose another --port or --host"
        ) from error


def reason(error: Exception) -> str:
    """Return the system's own words for why an address can't be used; asyncio and socket add the address to them."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number and number > 0 else str(error)  # the resolver's numbers are negative


def bound(host: str, port: int) -> socket.socket:
    """`::` is every address, of both kinds. OSError, or ValueError for what can't be a name, as it comes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)


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
        http = type("Http", (Http,), {"most": settings.connections, "metrics": service.metrics})
        super().__init__(
            uvicorn.Config(
                make_app(service), host=settings.host, port=settings.port, http=http, ws=LiveSocket,
                ws_max_size=BODY_BYTES, ws_max_queue=4, ws_per_message_deflate=False, access_log=False, log_config=None, proxy_headers=False,
                server_header=False, timeout_keep_alive=15, timeout_graceful_shutdown=_LAST_ANSWERS_S,
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens until the running picture is finished, so that whoever calls meanwhile is told: 503. uvicorn would
        refuse connections from the first moment on. Live pages are told at once, and come back by themselves."""
        begin_stop(self._service)
        for connection in list(self.server_state.connections):
            if isinstance(connection, LiveSocket):
                connection.shutdown()
        end = time.monotonic() + self._service.settings.grace_s
        while self._service.worker.alive and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        begin_stop(self._service)
        super().handle_exit(sig, frame)
