"""The live WebSocket: latest wins, previews, keys, limits."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vega_edge.errors import EngineError
from vega_edge.runtime.request import Request
from vega_edge.serve import keys
from vega_edge.serve.live import WAITING_S

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until

REPLY_S = 30


@contextlib.contextmanager
def live(server: Running, ready: bool = True, **options: Any) -> Iterator[Any]:
    address = server.url.replace("http", "ws") + "/live"
    with connect(address, proxy=None, **options) as socket:
        if ready:
            assert receive(socket)["type"] == "ready"
        yield socket


def send(socket: Any, **message: Any) -> None:
    socket.send(json.dumps(message))


def receive(socket: Any) -> dict[str, Any]:
    """A message; of a binary one its head, with the picture under "image"."""
    data = socket.recv(timeout=REPLY_S)
    if isinstance(data, str):
        return dict(json.loads(data))
    length = int.from_bytes(data[:4], "big")
    image = Image.open(io.BytesIO(data[4 + length :]))
    return {**json.loads(data[4 : 4 + length]), "image": image}


def until(socket: Any, kind: str, **facts: Any) -> dict[str, Any]:
    while True:
        message = receive(socket)
        if message["type"] == kind and all(message.get(k) == v for k, v in facts.items()):
            return message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def before(request: Any, index: int) -> None:
        if request.prompt == "fail":
            raise EngineError("the engine failed")

    with running(tmp_path_factory.mktemp("live"), FakeDrawer(before_step=before)) as server:
        yield server


def test_previews_and_the_picture(server: Running) -> None:
    with live(server) as socket:
        send(socket, type="draw", id=5, prompt="a star", seed=9, num_inference_steps=4, previews="on")
        heads = [receive(socket) for _ in range(4)]
    assert [(h["type"], h.get("index")) for h in heads[:3]] == [("preview", 1), ("preview", 2), ("preview", 3)]
    picture = heads[3]
    assert {
        "type": "picture",
        "id": 5,
        "slot": "a",
        "seed": 9,
        "steps": 4,
        "scheduler": "LCM",
    }.items() <= picture.items()
    assert picture["image"].format == "JPEG" and picture["image"].size == (picture["width"], picture["height"])
    assert {"queue", "draw", "decode"} <= set(picture["seconds"])
    assert picture["parameters"].startswith("a star\nSteps: 4")


def test_a_prompt_that_is_cut_off_is_told(tmp_path: Path) -> None:
    with running(tmp_path, real=True) as server, live(server) as socket:
        for prompt, told in (("a red star " * 40, ["prompt cut off after 75 tokens"]), ("a star", [])):
            send(socket, type="draw", prompt=prompt, num_inference_steps=1, img_width=64, img_height=64)
            assert until(socket, "picture")["adjusted"] == told


def test_webp_and_what_ready_says(server: Running) -> None:
    with live(server, ready=False) as socket:
        ready = receive(socket)
        assert ready["models"][0]["name"] == "demo-vegart"  # the machine may have others besides
        assert {"segmind-vega", "segmind-vega-rt-v1"} < set(ready["models"][0]["slugs"])  # aliases
        assert ready["models"][0]["parameters"]["num_inference_steps"]["default"] == 4
        assert {"LCM", "Euler a"} <= set(ready["schedulers"])
        send(socket, type="draw", id=1, prompt="a", format="webp", previews="off")
        assert until(socket, "picture")["image"].format == "WEBP"


def test_the_latest_wins(tmp_path: Path) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server, live(server) as socket:
        send(socket, type="draw", id=1, prompt="first", num_inference_steps=50)
        gate.wait()
        for i in range(2, 30):
            send(socket, type="draw", id=i, prompt=f"p{i}", num_inference_steps=2)
        wait_until(lambda: server.service.worker.waiting == 1 and "p29" in str(_waiting(server)))
        gate.let(100)
        assert until(socket, "picture")["id"] == 29
        assert [step for step in drawer.steps if step[0] == "first"] == [("first", 1)]
        assert not any(prompt.startswith("p") and prompt != "p29" for prompt, _ in drawer.steps)


def _waiting(server: Running) -> list[str]:
    return [job.prompt for job in server.service.worker._lines["live"].in_order()]


class Device:
    """A drawer whose steps take a while, so that there is something to share; whose steps they were, in order."""

    def __init__(self, step_s: float = 0.004) -> None:
        self.turns: list[str] = []
        self.drawer = FakeDrawer(before_step=lambda request, index: (time.sleep(step_s), self._note(request))[0])

    def _note(self, request: Any) -> None:
        self.turns.append(request.prompt.split()[0])

    def share(self, who: str, since: int) -> float:
        """Of the steps since then, from 0 to 1."""
        turns = self.turns[since:]
        return turns.count(who) / len(turns)


def draws(socket: Any, prompt: str, pictures: int, **facts: Any) -> None:
    """Asks for the next picture as soon as it has one, as somebody does who types and looks."""
    for i in range(pictures):
        send(socket, type="draw", id=i, prompt=f"{prompt} {i}", previews="off", **facts)
        until(socket, "picture", id=i)


@contextlib.contextmanager
def beside(act: Callable[[], Any]) -> Iterator[None]:
    """Goes on with an act in another thread, until the block is left."""
    left = threading.Event()

    def go_on() -> None:
        with contextlib.suppress(ConnectionClosed):
            while not left.is_set():
                act()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    yield
    left.set()
    thread.join(REPLY_S)
    assert not thread.is_alive()


def test_a_page_that_asks_without_end_gets_its_share_and_no_more(tmp_path: Path) -> None:
    """Each of its requests ends the one before, so it never gets a picture; the other page gets them all the same."""
    device, numbers = Device(), itertools.count()
    with running(tmp_path, device.drawer) as server, live(server) as greedy, live(server) as modest:

        def ask() -> None:
            send(greedy, type="draw", id=next(numbers), prompt="greedy", num_inference_steps=20, previews="off")
            time.sleep(0.002)

        with beside(ask):
            wait_until(lambda: device.turns.count("greedy") > 5)
            since = len(device.turns)
            draws(modest, "modest", 25, num_inference_steps=4)
            assert 1 / 3 < device.share("modest", since) < 2 / 3
        assert next(numbers) > 50


def test_a_page_that_compares_two_pictures_gets_no_more_than_one_that_does_not(tmp_path: Path) -> None:
    device = Device()
    with running(tmp_path, device.drawer) as server, live(server) as two, live(server) as one:

        def ask(slot: str) -> None:
            send(two, type="draw", id=1, slot=slot, prompt="two", num_inference_steps=6, previews="off")

        ask("a")
        ask("b")
        with beside(lambda: ask(until(two, "picture")["slot"])):
            wait_until(lambda: device.turns.count("two") > 12)
            since = len(device.turns)
            draws(one, "one", 25, num_inference_steps=6)
            assert 0.4 < device.share("one", since) < 0.6


def test_a_page_that_was_idle_has_no_savings(tmp_path: Path) -> None:
    device = Device(0.01)
    with running(tmp_path, device.drawer) as server, live(server) as busy, live(server) as idle:
        draws(busy, "busy", 15, num_inference_steps=4)
        since = len(device.turns)
        with beside(lambda: draws(idle, "idle", 1, num_inference_steps=4)):
            draws(busy, "busy", 10, num_inference_steps=4)
        assert 1 / 3 < device.share("busy", since) < 2 / 3


def test_two_slots_are_two_pictures_and_stop_stops_one(server: Running) -> None:
    with live(server) as socket:
        for slot, seed in (("a", 1), ("b", 2)):
            send(socket, type="draw", id=seed, slot=slot, prompt="a star", seed=seed, previews="off")
        got = {h["slot"]: h["seed"] for h in (receive(socket), receive(socket))}
    assert got == {"a": 1, "b": 2}


def test_a_page_that_waits_is_told(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server, live(server) as first, live(server) as second:
        send(first, type="draw", id=1, prompt="long", num_inference_steps=9, previews="off")
        gate.wait()
        send(second, type="draw", id=1, prompt="waits", num_inference_steps=1)
        assert receive(second) == {"type": "waiting", "id": 1, "slot": "a", "ahead": 0}
        gate.let(100)
        assert until(second, "picture")["id"] == 1
        assert until(first, "picture")["id"] == 1


def test_a_page_that_is_alone_is_never_told_that_it_waits_for_others(tmp_path: Path) -> None:
    """Neither for its other picture, nor for the step in which its older one is given up, nor for one that left."""
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        with live(server) as left:
            send(left, type="draw", id=1, prompt="reloaded", num_inference_steps=9, previews="off")
            gate.wait()
        wait_until(lambda: all(w.jobs[0].cancelled for w in server.service.worker._walks.values()))
        with live(server) as page:
            for slot in ("a", "b", "a"):
                send(page, type="draw", id=1, slot=slot, prompt=slot, num_inference_steps=1, previews="off")
            heard_while_waiting(page, [])
            gate.let(1)
            gate.wait()
            send(page, type="draw", id=2, prompt="a again", num_inference_steps=1, previews="off")
            heard_while_waiting(page, [])
            gate.let(100)
            assert until(page, "picture", id=2)["slot"] == "a"


def heard_while_waiting(socket: Any, ahead: list[int]) -> None:
    """Waits for longer than a page waits before it is told, and compares all that it was told."""
    time.sleep(3 * WAITING_S)
    send(socket, type="ping")
    heard = []
    while (message := receive(socket))["type"] != "pong":
        heard.append((message["type"], message["ahead"]))
    assert heard == [("waiting", count) for count in ahead]


def test_ahead_are_the_other_pages_that_wait_and_it_is_told_anew_when_they_are_fewer(tmp_path: Path) -> None:
    gate = Gate()
    with contextlib.ExitStack() as open_now:
        server = open_now.enter_context(running(tmp_path, FakeDrawer(before_step=gate)))
        first, second, third = (open_now.enter_context(live(server)) for _ in range(3))
        send(first, type="draw", id=1, prompt="first", num_inference_steps=1, previews="off")
        gate.wait()
        for slot in ("a", "b"):
            send(second, type="draw", id=2, slot=slot, prompt=slot, num_inference_steps=1, previews="off")
        for slot in ("a", "b"):
            send(third, type="draw", id=3, slot=slot, prompt=slot, num_inference_steps=1, previews="off")
        heard_while_waiting(third, [1, 1])  # once a slot: of the second page's two one is drawn before
        gate.let(1)
        gate.wait()
        send(second, type="stop", slot="b")
        heard_while_waiting(third, [0, 0])
        gate.let(1)
        gate.wait()
        assert receive(third) == {"type": "started", "id": 3, "slot": "a"}
        gate.let(100)
        assert [until(third, "picture")["slot"] for _ in range(2)] == ["a", "b"]


def test_a_page_waits_for_others_also_while_their_model_is_opened_or_their_jobs_are_queued(tmp_path: Path) -> None:
    gate, opening = Gate(), Gate()

    class Slow(FakeDrawer):
        def request(self, prompt: str, **options: Any) -> Request:
            if prompt == "opens":
                opening(None, 0)
            return super().request(prompt, **options)

    with running(tmp_path, Slow(before_step=gate)) as server, live(server) as first, live(server) as second:
        send(first, type="draw", id=1, prompt="opens", num_inference_steps=1, previews="off")
        opening.wait()
        send(second, type="draw", id=1, prompt="waits", num_inference_steps=1, previews="off")
        heard_while_waiting(second, [0])
        opening.let()
        gate.let(2)
        until(second, "picture")
        for _ in range(3):
            assert server.post("/v2/demo-vegart").status_code == 200
        gate.wait()
        gate.wait()
        gate.wait()
        send(second, type="draw", id=2, prompt="waits", num_inference_steps=1, previews="off")
        heard_while_waiting(second, [0])  # it is drawn between two of their steps, however many they are
        gate.let(100)
        until(second, "picture")


def test_a_page_that_leaves_takes_its_picture_with_it(tmp_path: Path) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server:
        with live(server) as socket:
            send(socket, type="draw", id=1, prompt="left", num_inference_steps=50)
            gate.wait()
        wait_until(lambda: all(w.jobs[0].cancelled for w in server.service.worker._walks.values()))
        gate.let(60)
        with live(server) as socket:
            send(socket, type="draw", id=1, prompt="next", num_inference_steps=1)
            until(socket, "picture")
        assert len([s for s in drawer.steps if s[0] == "left"]) <= 2


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("garbage", "the message is not JSON"),
        ("[" * 30000, "the message is not JSON"),
        ("[]", "the message must be a JSON object with a type"),
        (b"\0\1", "messages must be text, got bytes"),
        ('{"type": "x"}', "type: must be draw, stop, ping or hello, got 'x'"),
        ('{"type": "draw"}', "prompt: must be text, got nothing"),
        ('{"type": "draw", "prompt": "a", "slot": ["a"]}', "slot: must be one of a, b, got \"['a']\""),
        ('{"type": "draw", "prompt": "a", "seed": NaN}', "the message is not JSON"),
        ('{"type": "draw", "prompt": "a", "model": {"x": 1}}', "model: must be one of demo-vegart"),
        ('{"type": "draw", "prompt": "a", "model": "../etc"}', "model: must be one of demo-vegart"),
        ('{"type": "draw", "prompt": "a", "num_inference_steps": 99}', "num_inference_steps: must be from 1 to 50, got 99"),
        ('{"type": "draw", "prompt": "fail"}', "the engine failed"),
    ],
)  # fmt: skip
def test_garbage_is_answered_and_the_next_request_works(server: Running, message: str | bytes, text: str) -> None:
    with live(server) as socket:
        socket.send(message)
        assert until(socket, "error")["error"] == text
        send(socket, type="draw", id=2, prompt="a star", previews="off")
        assert until(socket, "picture")["id"] == 2


def test_an_oversized_message_ends_its_socket_only(server: Running) -> None:
    with live(server) as socket:
        with contextlib.suppress(ConnectionClosed):
            socket.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=REPLY_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    with live(server):
        pass


def test_foreign_origins_get_no_socket(server: Running) -> None:
    for origin in ("http://evil.com", "null"):
        with pytest.raises(InvalidStatus) as refused, live(server, origin=origin):  # type: ignore[arg-type]
            pass
        assert refused.value.response.status_code == 403
    with live(server, origin=server.url):  # type: ignore[arg-type]
        pass


def test_the_key_is_the_first_message(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file) as server:
        for first in ('{"type": "hello", "key": "SG_no"}', '{"type": "draw", "prompt": "a"}', "garbage"):
            with live(server, ready=False) as socket:
                socket.send(first)
                assert receive(socket)["error"] == "Unauthorized. API key is invalid or may have expired."
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(timeout=REPLY_S)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401
        with live(server, ready=False) as socket:
            send(socket, type="hello", key=key)
            assert receive(socket)["type"] == "ready"


def test_a_key_draws_as_often_as_it_may_whichever_way(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file, rate=3) as server:
        assert server.post("/v1/demo-vegart", headers={"x-api-key": key}).status_code == 200
        with live(server, ready=False) as socket:
            send(socket, type="hello", key=key)
            for i in (1, 2):
                send(socket, type="draw", id=i, prompt="a", previews="off")
                assert until(socket, "picture")["id"] == i
            send(socket, type="draw", id=3, prompt="a")
            refused = until(socket, "error")
            assert refused["id"] == 3 and refused["slot"] == "a" and 0 < refused["retry_s"] <= 20
            assert refused["error"].startswith("more than 3 pictures a minute; try again in ")


def test_a_key_that_is_revoked_closes_its_page_at_the_next_picture(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with running(tmp_path / "data", api_keys=file) as server, live(server, ready=False) as socket:
        send(socket, type="hello", key=key)
        assert receive(socket)["type"] == "ready"
        keys.revoke(file, "page")
        time.sleep(1.1)
        send(socket, type="draw", id=1, prompt="a")
        assert receive(socket)["error"] == "Unauthorized. API key is invalid or may have expired."
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=REPLY_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401


def test_sockets_without_a_key_take_no_room_from_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.serve.live.NEWCOMERS", 2)
    file = tmp_path / "keys.json"
    key = keys.add(file, "page")
    with contextlib.ExitStack() as open_now:
        server = open_now.enter_context(running(tmp_path / "data", api_keys=file, sockets=1))
        silent = open_now.enter_context(live(server, ready=False))  # says nothing
        page = open_now.enter_context(live(server, ready=False))
        send(page, type="hello", key=key)
        assert receive(page)["type"] == "ready"
        open_now.enter_context(live(server, ready=False))
        open_now.enter_context(live(server, ready=False))
        assert receive(silent)["error"] == "too many pages are just connecting; try again later"


def test_one_line_of_log_for_each_drawing_and_each_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    def before(request: Any, index: int) -> None:
        gate(request, index)
        if request.prompt == "fail":
            raise EngineError("the engine failed")

    with (
        caplog.at_level("INFO", "vega_edge.serve.requests"),
        running(tmp_path, FakeDrawer(before_step=before)) as server,
    ):
        with live(server) as socket:
            send(socket, type="draw", id=1, prompt="replaced", seed=1, num_inference_steps=9)
            gate.wait()
            send(socket, type="draw", id=2, prompt="fail", seed=2)
            wait_until(lambda: server.service.worker.waiting == 1)
            gate.let(2)
            assert until(socket, "error")["slot"] == "a"
            send(socket, type="draw", id=3, prompt="drawn", seed=3, num_inference_steps=1)
            gate.let(1)
            until(socket, "picture")
        with pytest.raises(InvalidStatus), live(server, origin="http://evil.com"):  # type: ignore[arg-type]
            pass
        wait_until(lambda: caplog.text.count("WEBSOCKET") == 2)
    lines = [json.loads(r.message) for r in caplog.records if '"path": "/live"' in r.message]
    assert [(x["seed"], x["status"]) for x in lines if "seed" in x] == [(1, 499), (2, 500), (3, 200)]
    assert {"time", "id", "client", "model", "queue_s", "draw_s"} <= set(lines[2]) and "prompt" not in lines[2]
    closed, refused = [x for x in lines if "ms" in x]
    assert (closed["status"], closed["method"]) == (1000, "WEBSOCKET")
    why = "requests from other web pages are not allowed; behind a proxy for TLS: --trusted-proxy ADDRESS"
    assert (refused["status"], refused["error"]) == (403, why)


def test_a_ping_is_answered(server: Running) -> None:
    with live(server) as socket:
        send(socket, type="ping")
        assert receive(socket) == {"type": "pong"}


def test_a_page_that_is_gone_without_a_word_makes_room(tmp_path: Path) -> None:
    """Such as a phone that left the building: its connection is never closed."""
    with running(tmp_path, sockets=1) as server:
        server.server.config.ws_ping_interval, server.server.config.ws_ping_timeout = 0.1, 0.7
        with socket.create_connection(("127.0.0.1", server.service.settings.port), timeout=20) as gone:
            gone.sendall(
                b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            heard = b""
            while b'"ready"' not in heard:
                heard += gone.recv(4096)
            wait_until(lambda: "vega_edge_live_sockets 0.0" in server.http.get("/metrics").text)
            with live(server) as page:
                time.sleep(1.0)  # one that answers stays
                send(page, type="ping")
                assert receive(page) == {"type": "pong"}


def test_a_picture_that_can_not_be_made_into_a_file_is_said_and_the_next_one_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> bytes:
        raise RuntimeError("secret detail")

    with running(tmp_path) as server, live(server) as socket:
        with monkeypatch.context() as patched:
            patched.setattr("vega_edge.serve.live.encode", broken)
            patched.setattr("vega_edge.serve.live.encode_preview", broken)
            send(socket, type="draw", id=1, prompt="a star", previews="on")
            why = "an internal error; it is in the log"
            assert receive(socket) == {"type": "error", "id": 1, "slot": "a", "error": why}
        send(socket, type="draw", id=2, prompt="a star", previews="off")
        assert until(socket, "picture")["id"] == 2


def test_too_many_pages_are_told_so(tmp_path: Path) -> None:
    with running(tmp_path, sockets=1) as server, live(server):
        with live(server, ready=False) as second:
            assert receive(second)["error"] == "1 live pages are open, which is the most; try again later"
            with pytest.raises(ConnectionClosed):
                second.recv(timeout=REPLY_S)
        assert "vega_edge_live_sockets 1.0" in server.http.get("/metrics").text
