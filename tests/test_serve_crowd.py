"""Strangers who only wait: they make room, and what is refused before there is a request is said in our form."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from websockets.exceptions import ConnectionClosed

from vega_edge.serve import keys
from vega_edge.serve.live import NEWCOMERS
from vega_edge.serve.metrics import Metrics
from vega_edge.serve.protocols import Http

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until
from .test_serve_live import live, receive, send

POST = b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
UNFINISHED = POST + b"Content-Length: 15\r\n\r\n{"
HELLO = (
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
BUSY = "too many pages are just connecting; try again later"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Running, str]]:
    key = keys.add(tmp_path / "keys.json", "me")
    with running(tmp_path / "data", api_keys=tmp_path / "keys.json", trusted_proxies=("127.0.0.1",)) as server:
        yield server, key


def from_(address: str) -> dict[str, Any]:
    return {"ready": False, "additional_headers": {"x-forwarded-for": address}}


def test_silent_strangers_keep_no_page_out(keyed: tuple[Running, str]) -> None:
    """All of them come from elsewhere, and one page after the other gets in while they wait."""
    server, key = keyed
    with contextlib.ExitStack() as open_now:
        strangers = [open_now.enter_context(live(server, **from_("6.6.6.6"))) for _ in range(NEWCOMERS)]
        for number in range(3):
            page = open_now.enter_context(live(server, **from_(f"10.0.0.{number}")))
            send(page, type="hello", key=key)
            assert receive(page)["type"] == "ready"
        assert receive(strangers[0])["error"] == BUSY
        with pytest.raises(ConnectionClosed) as closed:
            strangers[0].recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013


def test_more_strangers_push_out_strangers_and_not_a_page_that_is_slow_with_its_key(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    with contextlib.ExitStack() as open_now:
        page = open_now.enter_context(live(server, **from_("10.0.0.1")))
        strangers = [open_now.enter_context(live(server, **from_("6.6.6.6"))) for _ in range(NEWCOMERS + 3)]
        assert [receive(stranger)["error"] for stranger in strangers[:4]] == [BUSY] * 4
        send(page, type="hello", key=key)
        assert receive(page)["type"] == "ready"
        send(strangers[4], type="hello", key=key)  # the others are where they were
        assert receive(strangers[4])["type"] == "ready"


def test_strangers_who_come_at_once_are_no_more_than_others(keyed: tuple[Running, str]) -> None:
    server, _ = keyed
    with contextlib.ExitStack() as open_now:
        strangers = [open_now.enter_context(client(server)) for _ in range(3 * NEWCOMERS)]
        for stranger in strangers:
            stranger.sendall(HELLO)
        heard = dict.fromkeys(strangers, b"")

        def pushed_out() -> int:
            for stranger in strangers:
                stranger.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    heard[stranger] += stranger.recv(4096)
            return sum(BUSY.encode() in data for data in heard.values())

        wait_until(lambda: pushed_out() >= 2 * NEWCOMERS, 8)
        assert pushed_out() == 2 * NEWCOMERS


def client(server: Running, source: str = "127.0.0.1") -> socket.socket:
    address = ("127.0.0.1", server.service.settings.port)
    return socket.create_connection(address, timeout=20, source_address=(source, 0))


def whole(connection: socket.socket) -> bytes:
    heard = b""
    while data := connection.recv(4096):
        heard += data
    return heard


def test_silent_connections_keep_no_client_out(tmp_path: Path) -> None:
    with running(tmp_path, connections=8) as server, contextlib.ExitStack() as open_now:
        silent = [open_now.enter_context(client(server)) for _ in range(8)]
        wait_until(lambda: len(server.server.server_state.connections) == 8)
        for _ in range(3):
            one = open_now.enter_context(client(server, "127.0.0.2"))
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(12) == b"HTTP/1.1 200"
        assert silent[0].recv(1) == b""  # the oldest has gone
        silent[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):  # the newest has not
            silent[-1].recv(1)


def test_who_has_most_connections_takes_none_from_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that it has are busy, so it is told to come again, in our form, and it is logged and counted."""
    gate = Gate()
    with (
        caplog.at_level("INFO", "vega_edge.serve.requests"),
        running(tmp_path, FakeDrawer(before_step=gate), connections=5) as server,
        contextlib.ExitStack() as open_now,
    ):
        open_now.callback(gate.let, 50)
        idle, slow = (open_now.enter_context(client(server, "127.0.0.2")) for _ in range(2))
        slow.sendall(UNFINISHED)
        for _ in range(3):
            open_now.enter_context(client(server)).sendall(POST + b'Content-Length: 15\r\n\r\n{"prompt": "a"}')
        wait_until(lambda: sum(not c.may_go for c in server.server.server_state.connections) == 3)  # type: ignore[union-attr]
        head, _, body = whole(open_now.enter_context(client(server))).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n") and b"\r\nretry-after: 1\r\n" in head
        why = "more than 5 connections; try again later"
        assert json.loads(body) == {"error": why} and b"\r\nx-rate-limit-reset-at-utc: " in head
        (line,) = (json.loads(r.message) for r in caplog.records if "connections" in r.message)
        assert (line["status"], line["error"], line["client"]) == (429, why, "127.0.0.1")
        assert line["id"].encode() in head
        idle.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b'vega_edge_responses_total{route="none",status="429"} 1.0' in whole(idle)
        gate.let(50)
        slow.sendall(b'"prompt": "a"}')
        assert slow.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("shown_out", [False, True])
def test_clients_that_keep_others_waiting_keep_no_client_out(tmp_path: Path, shown_out: bool) -> None:
    """With the rest of a request, or with their goodbye after they were shown out."""
    keys.add(tmp_path / "keys.json", "me")
    with (
        running(
            tmp_path / "data", connections=24, **({"api_keys": tmp_path / "keys.json"} if shown_out else {})
        ) as server,
        contextlib.ExitStack() as open_now,
    ):
        other = open_now.enter_context(client(server, "127.0.0.3"))
        strangers = [open_now.enter_context(client(server)) for _ in range(23)]
        for stranger in strangers:
            stranger.sendall(HELLO if shown_out else UNFINISHED)
        wait_until(lambda: leaving(server) == (23 - NEWCOMERS if shown_out else 23), 8)
        for _ in range(3):
            one = open_now.enter_context(client(server, "127.0.0.2"))
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(ConnectionResetError):
            whole(strangers[0])  # the oldest has gone
        other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"


def leaving(server: Running) -> int:
    """Those that were asked something, and may go all the same."""
    return sum(c.may_go and not c.idle for c in server.server.server_state.connections)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET /\r\n\r\n"]
)
def test_what_is_no_http_is_answered_in_our_form(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vega_edge.serve.requests"), running(tmp_path) as server:
        with client(server) as connection:
            connection.sendall(data)
            head, _, body = whole(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"content-type: application/json" in head
        assert json.loads(body) == {"error": "this is not HTTP that can be read"}
        (line,) = (json.loads(r.message) for r in caplog.records if "not HTTP" in r.message)
        assert (line["status"], line["client"]) == (400, "127.0.0.1")
        assert 'vega_edge_responses_total{route="none",status="400"} 1.0' in server.http.get("/metrics").text


KEY, UPGRADE = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
CURE = "; ask by GET, with version 13, a key of 16 bytes and no body"


@pytest.mark.parametrize(
    ("line", "fields", "status", "why"),
    [
        ("GET /live", VERSION, 400, "missing Sec-WebSocket-Key header"),
        ("GET /live", VERSION + b"Sec-WebSocket-Key: x\r\n", 400, ""),
        ("GET /live", KEY + b"Sec-WebSocket-Version: 12\r\n", 400, "invalid Sec-WebSocket-Version header: 12"),
        ("POST /live", KEY + VERSION, 405, "unsupported HTTP method"),
        ("POST /live", KEY + VERSION + b"Content-Length: 3\r\n", 400, ""),
        ("GET /live", KEY + VERSION + b"Content-Length: 3\r\n", 400, ""),
        ("GET /live", KEY + VERSION + b"Transfer-Encoding: chunked\r\n", 400, ""),
        ("GET /live", KEY + VERSION + b"X: " + b"a" * 9000 + b"\r\n", 400, ""),
        ("GET /nope", KEY + VERSION, 403, None),
    ],
)  # fmt: skip
def test_a_websocket_that_can_not_be_opened_is_refused_in_our_form(
    tmp_path: Path, line: str, fields: bytes, status: int, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "vega_edge.serve.requests"), running(tmp_path) as server:
        with client(server) as connection:
            connection.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\n".encode() + UPGRADE + fields + b"\r\n")
            head, _, body = whole(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status) and b"content-type: application/json" in head.lower()
        text = json.loads(body)["error"]
        if why is None:
            assert text == "no WebSocket is at '/nope'; there is one at /live"
        else:
            assert (
                text.startswith(f"the WebSocket can't be opened: {why}") and text.endswith(CURE) and "None" not in text
            )
        wait_until(lambda: any('"error"' in r.message for r in caplog.records))
        (said,) = (json.loads(r.message) for r in caplog.records if '"error"' in r.message)
        assert (said["status"], said["error"], said["client"]) == (status, text, "127.0.0.1")


def test_garbage_in_a_body_and_after_one(tmp_path: Path) -> None:
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(tmp_path) as server:
        for data, statuses in (
            (get + b"\0\0\0\r\n\r\n", [b"200", b"400"]),
            (POST + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n", [b"400"]),
        ):
            with client(server) as connection:
                connection.sendall(data)
                heard = whole(connection)
            assert [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]] == statuses
            assert heard.endswith(b'{"error": "this is not HTTP that can be read"}')


@pytest.mark.parametrize(("started", "complete", "said"), [(True, False, 0), (False, False, 1), (True, True, 1)])
def test_a_refusal_never_lands_in_the_middle_of_an_answer(started: bool, complete: bool, said: int) -> None:
    written: list[bytes] = []
    connection = Http.__new__(Http)
    connection.client, connection.metrics = ("10.0.0.1", 5), Metrics()
    connection.cycle = SimpleNamespace(response_started=started, response_complete=complete)  # type: ignore[assignment]
    connection.transport = SimpleNamespace(write=written.append, close=lambda: written.append(b"closed"))
    connection.refuse(400, "no")
    assert len(written) == said + 1 and written[-1] == b"closed"


def test_a_client_that_closes_its_sending_side_has_left(tmp_path: Path) -> None:
    """As docs/serve.md says: nothing on the wire tells one that still reads from one that is gone."""
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server, client(server) as connection:
        connection.sendall(
            b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 15\r\n\r\n{"prompt": "a"}'
        )
        gate.wait()
        connection.shutdown(socket.SHUT_WR)
        assert whole(connection) == b""
        wait_until(lambda: all(w.jobs[0].cancelled for w in server.service.worker._walks.values()))
        gate.let(50)
        assert server.post("/v1/demo-vegart").status_code == 200
