"""Clients that ask and do not read what they asked for: others are served, memory is bounded, their sockets are freed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from vega_edge.serve import images, outbox
from vega_edge.serve.outbox import Message, Outbox

from .serve_fakes import FakeDrawer, job
from .serve_running import Running, running, wait_until
from .test_serve_live import live, send, until

BIG = 8 << 20  # bytes: more than the system takes for a client that does not read
UPGRADE = (
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
FILE = "a" * 32 + ".jpeg"


def frame(kind: int, data: bytes) -> bytes:
    """A WebSocket frame of a client's, masked with zeros."""
    assert len(data) < 126
    return bytes([0x80 | kind, 0x80 | len(data)]) + bytes(4) + data


DRAW = frame(1, json.dumps({"type": "draw", "id": 1, "prompt": "big", "previews": "off"}).encode())
PING = frame(9, b"x" * 125)


def http(verb: str, path: str, body: str = "") -> bytes:
    head = f"{verb} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


ASKS = {
    "v1": http("POST", "/v1/demo-vegart", '{"prompt": "big"}'),
    "v1 twice": 2 * http("POST", "/v1/demo-vegart", '{"prompt": "big"}'),
    "a file": http("GET", f"/generations/{FILE}"),
    "live": UPGRADE,
}


@contextlib.contextmanager
def unread(server: Running, asks: bytes, receive_bytes: int = 4096) -> Iterator[socket.socket]:
    """A client that asks and reads when the test does."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.service.settings.port))
    with client:
        client.sendall(asks)
        heard = b""
        while asks == UPGRADE and b'"schedulers"' not in heard:
            heard += client.recv(4096)
        yield client


def waiting(server: Running) -> list[int]:
    """Bytes that wait for each connection."""
    found = (each.transport for each in list(server.server.server_state.connections))
    return sorted(transport.get_write_buffer_size() for transport in found if transport is not None)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a second of it, and pictures whose files are big."""
    monkeypatch.setattr("vega_edge.serve.protocols.UNREAD_S", 0.5)

    def encode(image: Any, request: Any, *rest: Any) -> bytes:
        return bytes(BIG) if request.prompt == "big" else images.encode(image, request, *rest)

    for module in ("routes_v1", "live"):
        monkeypatch.setattr(f"vega_edge.serve.{module}.encode", encode)
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / FILE).write_bytes(bytes(BIG))


@pytest.mark.parametrize("what", list(ASKS))
def test_who_does_not_read_is_cut_off_and_harms_nobody(tmp_path: Path, patience: None, what: str) -> None:
    with running(tmp_path, connections=4, sockets=1) as server, unread(server, ASKS[what]) as client:
        client.sendall(DRAW if what == "live" else b"")
        wait_until(lambda: max(waiting(server), default=0) > 0)
        assert server.post("/v1/demo-vegart", {"prompt": "small"}).status_code == 200  # meanwhile
        server.http.close()  # its connection would be kept
        wait_until(lambda: waiting(server) == [])
        wait_until(lambda: not server.server.server_state.tasks)
        with live(server) as page:  # there is room for one
            send(page, type="draw", id=1, prompt="small")
            until(page, "picture")


@pytest.mark.parametrize("what", ["v1", "a file"])
def test_who_reads_slowly_gets_all_of_it(tmp_path: Path, patience: None, what: str) -> None:
    with running(tmp_path) as server, unread(server, ASKS[what], 1 << 18) as client:
        got, pauses = 0, 0
        while got < BIG:
            if got >= pauses * BIG // 16:
                time.sleep(0.1)
                pauses += 1
            heard = client.recv(1 << 18)
            assert heard
            got += len(heard)
        assert pauses == 16  # together three times as long as is waited for


def test_who_stops_reading_in_the_middle_is_cut_off(tmp_path: Path, patience: None) -> None:
    with running(tmp_path) as server, unread(server, ASKS["v1"], 1 << 18) as client:
        for _ in range(8):
            time.sleep(0.1)
            client.recv(1 << 18)
        assert waiting(server)[-1] > 0
        wait_until(lambda: waiting(server) == [])


def test_the_system_holds_little_for_who_does_not_read(tmp_path: Path, patience: None) -> None:
    with running(tmp_path) as server, unread(server, ASKS["v1"]):
        wait_until(lambda: max(waiting(server), default=0) > 0)
        time.sleep(0.3)  # in which it takes what it takes
        assert max(waiting(server)) > BIG - (1 << 20)


def test_many_who_do_not_read_leave_room_when_they_are_cut_off(tmp_path: Path, patience: None) -> None:
    with running(tmp_path, connections=6) as server, contextlib.ExitStack() as open_now:
        for _ in range(6):
            open_now.enter_context(unread(server, ASKS["a file"]))
        wait_until(lambda: len(waiting(server)) == 6)
        wait_until(lambda: _status(server) == 200)


def _status(server: Running) -> int:
    return httpx.get(f"{server.url}/healthz", timeout=20, trust_env=False).status_code


def test_what_waits_is_watched_from_its_first_byte(tmp_path: Path) -> None:
    """Not from 64 KiB on, or small answers would wait for ever."""
    with running(tmp_path) as server, unread(server, UPGRADE), unread(server, b"GET"):
        wait_until(lambda: len(waiting(server)) == 2)
        for connection in server.server.server_state.connections:
            assert connection.transport.get_write_buffer_limits() == (0, 0)


def test_a_flood_of_pings_from_who_does_not_read_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vega_edge.serve.protocols.UNREAD_S", 2.0)
    with running(tmp_path) as server, unread(server, UPGRADE) as client:
        (page,) = server.server.server_state.connections
        for _ in range(60):
            client.sendall(PING * 500)  # 4 MB; as much comes back
        wait_until(lambda: waiting(server)[0] > 0)
        wait_until(lambda: not page.conn.writes)  # where the answers to what it said last were put
        assert waiting(server)[0] < 1 << 20
        wait_until(lambda: waiting(server) == [])


def test_an_outbox_keeps_what_is_wanted_and_little_of_it() -> None:
    box = Outbox()
    wanted, gone = job(), job()
    for index in range(20):
        box.put(Message({"type": "preview", "index": index}, wanted, lambda: b""))
        box.put(Message({"type": "preview", "index": index}, gone, lambda: b""))
    assert len(box) == outbox.PREVIEWS
    box.put(Message({"type": "picture"}, gone, lambda: b""))
    gone.cancelled = True
    box.put(Message({"type": "picture"}, wanted, lambda: b""))
    assert len(box) == outbox.PREVIEWS // 2 + 1
    for index in range(outbox.MOST):
        box.put(Message({"type": "pong", "index": index}))
    assert len(box) == outbox.MOST

    async def next_two() -> list[Any]:
        return [(await asyncio.wait_for(box.get(), 5)).head for _ in "ab"]

    assert asyncio.run(next_two()) == [{"type": "pong", "index": 0}, {"type": "pong", "index": 1}]


def test_an_outbox_waits_for_what_is_wanted() -> None:
    async def get() -> Any:
        box, gone = Outbox(), job()
        box.put(Message({"type": "picture"}, gone))
        gone.cancelled = True
        later = asyncio.ensure_future(box.get())
        await asyncio.sleep(0.05)
        assert not later.done() and not len(box)
        box.put(Message({"type": "pong"}))
        return (await asyncio.wait_for(later, 5)).head

    assert asyncio.run(get()) == {"type": "pong"}


def test_a_page_that_says_much_at_once_lets_the_others_speak(tmp_path: Path) -> None:
    """Thousands of requests in one piece: what else the event loop has to do is done in between."""
    turns: list[int] = []
    with running(tmp_path, FakeDrawer()) as server, unread(server, UPGRADE) as client:
        loop = server.service.queue._loop
        assert loop is not None

        def tick() -> None:
            turns.append(len(asked))
            if len(turns) < 50:
                loop.call_soon(tick)

        asked: list[Any] = []
        submit = server.service.worker.submit

        def counted(job: Any, **options: Any) -> None:
            if not asked:
                loop.call_soon(tick)
            asked.append(job)
            submit(job, **options)

        server.service.worker.submit = counted  # type: ignore[method-assign]
        client.sendall(DRAW * 400)
        wait_until(lambda: len(asked) == 400 and len(turns) == 50)
        assert turns[9] < 50
