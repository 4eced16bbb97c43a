"""Before any route: who asks, from where, by which name of ours, how often, and whether there is still time.

An ASGI layer around the application. It also writes one line of log for each request and counts the answers.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from .service import Service
from .telling import not_now

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
_log = logging.getLogger(__name__)
_requests = logging.getLogger("vega_edge.serve.requests")
_PROBES = ("/healthz", "/readyz")
# What anybody may fetch: whether we live, the page (it asks for the key itself), and pictures, whose names are secrets.
_OPEN = (*_PROBES, "/", "/favicon.ico")
_OPEN_FOLDERS = ("/page/", "/generations/")
NO_KEY = "Missing Authorization or x-api-key in header"
BAD_KEY = "Unauthorized. API key is invalid or may have expired."


class Guard:
    def __init__(self, app: Any, service: Service) -> None:
        settings = service.settings
        self._app, self._service, self._keys = app, service, service.keys
        self._proxies = [ipaddress.ip_network(proxy) for proxy in settings.trusted_proxies]
        machine = socket.gethostname().lower()
        self._hosts = {
            "localhost",
            machine,
            f"{machine}.local",
            *(h.lower().rstrip(".") for h in (settings.host, *settings.hosts)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        called = headers.get("host", "")
        self._believe_proxy(scope, headers)
        # Routes say more of the request here, for its line in the log.
        scope["log"] = log = {"id": secrets.token_hex(8), "client": _address(scope)}
        scope["client_name"] = log["client"]
        try:
            fault = self._fault(scope, headers, called)
        except Exception:  # there is nobody else yet who would answer
            _log.exception("request %s failed on a defect", log["id"])
            fault = 500, f"an internal error; the log has it under {log['id']}"
        if fault:
            log["error"] = fault[1]
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send, fault)
            return
        await self._http(scope, receive, send, fault)

    async def _http(self, scope: Scope, receive: Receive, send: Send, fault: tuple[Any, ...] | None) -> None:
        start, status = time.perf_counter(), 499  # 499: the client left before there was an answer

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_headers(scope, message["headers"])]
            await send(message)

        try:
            if fault:
                await error_response(*fault)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            route = scope.get("route")
            self._service.metrics.response(getattr(route, "path", "none"), status)
            _write_end(scope, scope["method"], status, start)

    async def _socket(self, scope: Scope, receive: Receive, send: Send, fault: tuple[Any, ...] | None) -> None:
        """A line of log when it is refused, or when it ends, with the code that it was closed with."""
        start, status = time.perf_counter(), 1006  # 1006: the connection broke

        async def heard() -> Any:
            nonlocal status
            message = await receive()
            if message["type"] == "websocket.disconnect":
                status = message.get("code") or status
            return message

        async def said(message: Any) -> None:
            nonlocal status
            if message["type"] == "websocket.close":
                status = message.get("code", 1000)
            await send(message)

        try:
            if fault:
                await heard()
                await error_response(*fault)(scope, heard, said)  # before it is accepted, HTTP can be answered
                status = fault[0]
            else:
                await self._app(scope, heard, said)
        finally:
            _write_end(scope, "WEBSOCKET", status, start)

    def _fault(self, scope: Scope, headers: Mapping[str, str], called: str) -> tuple[Any, ...] | None:
        """Why the request goes no further: status, text, and headers where there are any. called: its own Host, which
        a page of a name that was rebound can't choose, while it may add X-Forwarded-Host to what a proxy sends on."""
        host = headers.get("host", "")
        for name in (called, host):
            if not self._is_ours(name):
                return 400, f"unknown Host {name[:80]!r}; call the server by its address, or add --allow-host NAME"
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin is not None and not _same_origin(origin, scope, host):
            return 403, "requests from other web pages are not allowed; behind a proxy for TLS: --trusted-proxy ADDRESS"
        if self._service.stopping and scope["path"] not in _PROBES:
            return 503, "the server is shutting down; try again in a moment", {"retry-after": "5"}
        fault = None if self._keys is None or _is_open(scope) else self._key_fault(scope, headers)
        if fault is None and scope["type"] == "websocket" and scope["path"] != "/live":
            return 403, f"no WebSocket is at {scope['path'][:80]!r}; there is one at /live"
        return fault

    def _key_fault(self, scope: Scope, headers: Mapping[str, str]) -> tuple[Any, ...] | None:
        assert self._keys is not None
        key = _key_in(headers)
        # A browser can only be asked for a key in this way, and only these pages are for browsers.
        ask = {"www-authenticate": 'Basic realm="API key as the password"'} if _for_browsers(scope["path"]) else {}
        if not key:
            return 401, NO_KEY, ask
        owner = self._keys.owner(key)
        if owner is None:
            return 401, BAD_KEY, ask
        scope["client_name"] = scope["log"]["client"] = f"key:{owner}"
        if scope.get("method") == "POST":  # a WebSocket has none
            wait_s = self._service.rate.take(owner)
            if wait_s:
                return 429, self._service.rate.refusal(wait_s), not_now(wait_s)
        return None

    def _is_ours(self, host: str) -> bool:
        """An address can't be rebound by a foreign name server; a name must be one that we know."""
        try:
            name = urlsplit(f"//{host}").hostname if not set(host) & set("/@?#\\ ") else None
        except ValueError:
            return False
        if not name:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.rstrip(".").lower() in self._hosts
        return True

    def _believe_proxy(self, scope: Scope, headers: dict[str, str]) -> None:
        """X-Forwarded-For, -Proto and -Host, only from the proxies that the user trusts."""
        try:
            peer = ipaddress.ip_address(scope["client"][0])
        except (TypeError, ValueError, KeyError):
            return
        if not any(peer in network for network in self._proxies):
            return
        last = {name: value.rpartition(",")[2].strip() for name, value in headers.items()}
        if last.get("x-forwarded-for"):
            scope["client"] = (last["x-forwarded-for"], 0)
        if last.get("x-forwarded-proto") in ("http", "https"):
            scope["scheme"] = last["x-forwarded-proto"]
        if last.get("x-forwarded-host"):
            headers["host"] = last["x-forwarded-host"]
            scope["headers"] = [(n, v) for n, v in scope["headers"] if n != b"host"]
            scope["headers"].append((b"host", headers["host"].encode("latin-1")))


def write_line(facts: Mapping[str, Any]) -> None:
    """The log that a program may read: JSON, one line each."""
    _requests.info("%s", json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}))


def _write_end(scope: Scope, method: str, status: int, start: float) -> None:
    taken_ms = round(1000 * (time.perf_counter() - start), 1)
    write_line({**scope["log"], "method": method, "path": scope["path"][:200], "status": status, "ms": taken_ms})


def error_response(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, dict(headers or {}))


def _headers(scope: Scope, present: Any) -> list[tuple[bytes, bytes]]:
    """On every answer: an id to find it by in the log, and what keeps browsers from guessing."""
    names = {name for name, _ in present}
    ours = [(b"x-request-id", scope["log"]["id"].encode()), (b"x-content-type-options", b"nosniff")]
    return [(name, value) for name, value in ours if name not in names]


def _key_in(headers: Mapping[str, str]) -> str:
    if headers.get("x-api-key"):
        return headers["x-api-key"]
    kind, _, rest = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _is_open(scope: Scope) -> bool:
    path = str(scope["path"])
    if scope["type"] == "websocket":
        return path == "/live"  # the key is its first message
    return scope["method"] in ("GET", "HEAD") and (path in _OPEN or path.startswith(_OPEN_FOLDERS))


def _for_browsers(path: str) -> bool:
    return path in ("/docs", "/metrics", "/openapi.json")


def _same_origin(origin: str, scope: Scope, host: str) -> bool:
    try:
        asked = urlsplit(origin)
    except ValueError:
        return False
    secure = scope["scheme"] in ("https", "wss")
    return asked.netloc.lower() == host.lower() and asked.scheme == ("https" if secure else "http")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "local"
