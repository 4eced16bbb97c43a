"""Who is let in: addresses and origins behind proxies, keys, rates, and what is open to all."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from vega_edge.serve import keys, rate
from vega_edge.serve.rate import Rate

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until

BEHIND = {"host": "draw.example", "x-forwarded-proto": "https"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    folder = tmp_path_factory.mktemp("guard")
    key = keys.add(folder / "keys.json", "me")
    with running(folder / "data", api_keys=folder / "keys.json", aliases={"livestock": "demo-vegart"}) as server:
        yield server, key


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("proxied")
    with running(folder, hosts=("draw.example",), trusted_proxies=("127.0.0.0/8",)) as server:
        yield server


def test_the_last_proxy_says_who_asks_and_not_the_client(proxied: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vega_edge.serve.requests"):
        proxied.http.get("/readyz", headers={"x-forwarded-for": "6.6.6.6, 10.0.0.9"})
        wait_until(lambda: "/readyz" in caplog.text)  # the line is written after the answer
    assert [json.loads(r.message)["client"] for r in caplog.records if "/readyz" in r.message] == ["10.0.0.9"]


def test_behind_tls_the_page_is_the_one_that_came_by_tls(proxied: Running) -> None:
    for origin, status in (
        ("https://draw.example", 200),
        ("http://draw.example", 403),
        ("https://draw.example:8", 403),
    ):
        answer = proxied.post("/v1/demo-vegart", headers={**BEHIND, "origin": origin})
        assert answer.status_code == status, origin


def test_a_name_with_its_dot_is_the_same_name(proxied: Running) -> None:
    assert proxied.http.get("/healthz", headers={"host": "localhost.:8000"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_that_changes_anything_is_open_to_other_pages(proxied: Running, method: str) -> None:
    answer = proxied.http.request(method, "/v1/demo-vegart", headers={"origin": "http://evil.com"})
    assert answer.status_code == 403


def test_only_whole_names_are_open_to_all(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    assert server.post("/livestock").status_code == 401
    assert server.post("/livestock", headers={"authorization": f"bearer  {key}"}).status_code == 200
    assert server.http.get("/generations/" + "A" * 32 + ".jpeg").status_code == 404


def test_a_socket_at_another_address_is_refused_with_a_key_and_without(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    for headers in ({}, {"x-api-key": key}):
        with pytest.raises(InvalidStatus) as refused:
            connect(server.url.replace("http", "ws") + "/metrics", proxy=None, additional_headers=headers)
        assert refused.value.response.status_code == 403


def test_a_key_that_takes_the_place_of_another_of_the_same_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.json"
    old = keys.add(file, "me")
    known, size = keys.KeyFile(file), file.stat().st_size
    assert known.owner(old) == "me"
    keys.revoke(file, "me")
    new = keys.add(file, "me")
    assert file.stat().st_size == size
    assert known.owner(old) is None and known.owner(new) == "me"


def test_a_key_that_is_revoked_while_the_file_is_read_for_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.json"
    key, load = keys.add(file, "me"), keys.load

    def slow(path: Path) -> list[keys.Key]:
        found = load(path)
        monkeypatch.setattr(keys, "load", load)
        keys.revoke(path, "me")
        return found

    monkeypatch.setattr(keys, "load", slow)
    assert keys.KeyFile(file).owner(key) is None


def test_clients_with_a_key_are_told_apart_by_it(keyed: tuple[Running, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, key = keyed
    seen: list[str] = []
    submit = server.service.worker.submit

    def heard(job: Any, **options: Any) -> None:
        seen.append(job.client)
        submit(job, **options)

    monkeypatch.setattr(server.service.worker, "submit", heard)
    for version in (1, 2):
        assert server.post(f"/v{version}/demo-vegart", headers={"x-api-key": key}).status_code == 200
    assert seen == ["key:me", "key:me"]


def test_every_answer_has_one_id_and_no_sniffing(proxied: Running) -> None:
    for path in ("/", "/nothing", "/healthz"):
        headers = proxied.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert len(headers.get_list("x-request-id")) == 1 and len(headers["x-request-id"]) == 16


def test_only_pictures_are_served_of_what_lies_beside_them(proxied: Running) -> None:
    folder, good = proxied.service.settings.data / "generations", "A" * 32 + ".jpeg"
    names = [".1-ab.part", "notes.txt", "B" * 32, "C" * 31 + ".jpeg", "D" * 32 + ".jpeg.bak"]
    for name in (good, *names):
        (folder / name).write_bytes(b"x")
    statuses = {name: proxied.http.get(f"/generations/{name}").status_code for name in (good, *names)}
    assert statuses == {good: 200, **dict.fromkeys(names, 404)}


def test_a_supervisor_may_ask_for_the_head_alone(proxied: Running) -> None:
    for path in ("/healthz", "/readyz"):
        answer = proxied.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert not {"head"} & set(proxied.http.get("/openapi.json").json()["paths"]["/readyz"])


def test_a_rate_is_a_bucket_that_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(rate.time, "monotonic", lambda: now)
    each = Rate(30)
    assert [each.take("a") for _ in range(30)] == [0.0] * 30
    assert each.take("a") == pytest.approx(2.0) and each.take("b") == 0.0
    now += 1.5
    assert each.take("a") == pytest.approx(0.5)
    now += 0.51
    assert each.take("a") == 0.0 and each.take("a") > 1.9
    now += 3600  # no savings beyond a minute's worth
    assert [each.take("a") for _ in range(31)][-2:] == [0.0, pytest.approx(2.0)]
    assert each.refusal(2.0) == "more than 30 requests a minute; try again in 2.0 s"
    assert not any(Rate(0).take("a") for _ in range(1000))


def test_a_refusal_says_when_it_ends(tmp_path: Path) -> None:
    key = keys.add(tmp_path / "keys.json", "me")
    with running(tmp_path / "data", api_keys=tmp_path / "keys.json", rate=1) as server:
        first, second = (server.post("/v1/demo-vegart", headers={"x-api-key": key}) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    assert 58 <= int(second.headers["retry-after"]) <= 60


def test_a_second_head_has_as_long_as_the_first_and_a_page_as_long_as_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vega_edge.serve.listener.HEAD_S", 0.5)
    with running(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.service.settings.port), timeout=10) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            heard = b""
            while b'"ok"' not in heard:
                heard += client.recv(4096)
            client.sendall(b"GET /heal")
            assert client.recv(4096) == b""
        with connect(server.url.replace("http", "ws") + "/live", proxy=None) as page:
            page.recv(timeout=20)
            time.sleep(0.8)
            page.send('{"type": "ping"}')
            assert json.loads(page.recv(timeout=20)) == {"type": "pong"}


def test_a_poll_that_is_held_ends_with_its_time_and_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        url = server.post("/v2/demo-vegart").json()["status_url"]
        gate.wait()
        monkeypatch.setattr("vega_edge.serve.routes_v2.POLL_S", 0.2)
        assert server.http.get(url).json()["status"] == "PROCESSING"
        monkeypatch.setattr("vega_edge.serve.routes_v2.POLL_S", 50.0)
        threading.Timer(0.3, server.service.queue.release_polls).start()
        start = time.monotonic()
        assert server.http.get(url).json()["status"] == "PROCESSING"
        assert server.http.get(url).json()["status"] == "PROCESSING"  # nor is another one held
        assert time.monotonic() - start < 25  # half of what it would be held for
        gate.let(50)


def test_a_signal_to_stop_is_heard_at_once_by_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.serve.routes_v2.POLL_S", 50.0)
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        url = server.post("/v2/demo-vegart").json()["status_url"]
        gate.wait()
        loop = server.service.queue._loop
        assert loop is not None
        stop = (loop.call_soon_threadsafe, (server.server.handle_exit, signal.SIGTERM, None))
        threading.Timer(0.3, *stop).start()
        start = time.monotonic()
        assert server.http.get(url).json()["status"] == "PROCESSING"
        assert time.monotonic() - start < 25 and server.service.stopping  # half of what it would be held for
        gate.let(50)
