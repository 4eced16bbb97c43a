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

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vega_edge.errors import UsageError
from vega_edge.serve import guard, keys, rate
from vega_edge.serve.catalog import OWN_NAMES, catalog
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


def test_what_is_open_is_open_for_fetching_only(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    for path in ("/page", "/live", "/healthz", "/readyz", "/generations", "/generations/x", "/page/app.js", "/"):
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            answer = server.http.request(method, path, json={"prompt": "a star"})
            assert (answer.status_code, answer.json()) == (401, {"error": guard.NO_KEY}), (method, path)
        assert server.http.request("POST", path, headers={"x-api-key": key}).status_code in (404, 405, 406)
    for path in ("/", "/healthz", "/readyz", "/page/app.js"):
        assert server.http.get(path).status_code == server.http.head(path).status_code == 200


def test_no_model_is_called_like_an_address_of_ours(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    paths = {f"/{name}" for name in OWN_NAMES} | {"/page/app.js", "/generations/" + "A" * 32 + ".jpeg"}
    fetched = [path for path in paths if server.http.get(path).status_code != 401]
    assert {path.split("/")[1] for path in fetched} <= OWN_NAMES
    description = server.http.get("/openapi.json", headers={"x-api-key": key}).json()
    assert {path.split("/")[1] for path in description["paths"]} <= OWN_NAMES
    for name in OWN_NAMES:
        with pytest.raises(UsageError) as refused:
            catalog({name: "demo-vegart"})
        assert str(refused.value) == f"--alias: '{name}' is an address of the server's own; choose another name"


def test_a_refusal_is_in_the_log_with_its_reason(keyed: tuple[Running, str], caplog: pytest.LogCaptureFixture) -> None:
    server, key = keyed
    asked = (
        ({}, 401, guard.NO_KEY),
        ({"x-api-key": "SG_no"}, 401, guard.BAD_KEY),
        ({"host": "evil.com"}, 400, "unknown Host 'evil.com'; call the server by its address, or add --allow-host NAME"),
        ({"x-api-key": key, "origin": "http://evil.com"}, 403, "requests from other web pages are not allowed; behind a proxy for TLS: --trusted-proxy ADDRESS"),
    )  # fmt: skip
    with caplog.at_level("INFO", "vega_edge.serve.requests"):
        for headers, status, _ in asked:
            assert server.post("/v1/demo-vegart", headers=headers).status_code == status
        wait_until(lambda: caplog.text.count("/v1/demo-vegart") == len(asked))
    lines = [json.loads(r.message) for r in caplog.records]
    assert [(line["status"], line["error"]) for line in lines] == [(status, text) for _, status, text in asked]


def test_a_defect_before_any_route_is_answered_in_our_form(
    keyed: tuple[Running, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, key = keyed

    def broken(owner: str) -> str:
        raise RecursionError("secret detail")

    assert server.service.keys is not None
    monkeypatch.setattr(server.service.keys, "owner", broken)
    answer = server.post("/v1/demo-vegart", headers={"x-api-key": key})
    assert answer.status_code == 500
    assert answer.json() == {"error": f"an internal error; the log has it under {answer.headers['x-request-id']}"}
    assert "secret detail" in caplog.text


def test_both_names_behind_a_proxy_must_be_ours(proxied: Running) -> None:
    """A page of a rebound name may send X-Forwarded-Host itself; its own Host it can't choose."""
    for host, forwarded, status in (
        ("evil.com", "localhost", 400),
        ("localhost", "evil.com", 400),
        ("localhost", "draw.example", 200),
        ("draw.example", "localhost", 200),
    ):
        answer = proxied.http.get("/healthz", headers={"host": host, "x-forwarded-host": forwarded})
        assert answer.status_code == status, (host, forwarded)


CSP = {
    "default-src": "'self'", "img-src": "'self' blob: data:", "base-uri": "'none'", "form-action": "'self'",
    "frame-ancestors": "'none'",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/", "/docs", "/page/app.js", "/page/app.css", "/page/icon.svg"])
def test_pages_may_load_nothing_but_our_own_files(proxied: Running, path: str) -> None:
    headers = proxied.http.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy == CSP  # no script is inline, and none is made of a text
    assert (headers["referrer-policy"], headers["x-content-type-options"]) == ("no-referrer", "nosniff")


def test_a_socket_at_another_address_is_refused_with_a_key_and_without(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    for headers, status in (({}, 401), ({"x-api-key": key}, 403)):
        with pytest.raises(InvalidStatus) as refused:
            connect(server.url.replace("http", "ws") + "/metrics", proxy=None, additional_headers=headers)
        assert refused.value.response.status_code == status


def test_a_socket_that_is_refused_is_told_why(keyed: tuple[Running, str]) -> None:
    server, _ = keyed
    why = "unknown Host 'evil.com'; call the server by its address, or add --allow-host NAME"
    stop = "the server is shutting down; try again in a moment"
    for host, status, text in (("evil.com", 400, why), ("localhost", 503, stop)):
        server.service.stopping = status == 503
        with pytest.raises(InvalidStatus) as refused:
            connect(
                f"ws://{host}:{server.service.settings.port}/live",
                sock=socket.create_connection(("127.0.0.1", server.service.settings.port)),
                proxy=None,
            )
        server.service.stopping = False
        answer = refused.value.response
        assert answer.status_code == status and answer.body is not None
        assert json.loads(answer.body) == {
            "error": text.replace("evil.com", f"evil.com:{server.service.settings.port}")
        }


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
    now += 0.497
    assert each.take("a") == 0.1  # 3 ms: never 0, which is the leave to go on
    now += 0.01
    assert each.take("a") == 0.0 and each.take("a") > 1.9
    now += 3600  # no savings beyond a minute's worth
    assert [each.take("a") for _ in range(31)][-2:] == [0.0, pytest.approx(2.0)]
    assert each.refusal(2.0) == "more than 30 pictures a minute; try again in 2.0 s"
    assert not any(Rate(0).take("a") for _ in range(1000))


def test_a_refusal_says_when_it_ends(tmp_path: Path) -> None:
    key = keys.add(tmp_path / "keys.json", "me")
    with running(tmp_path / "data", api_keys=tmp_path / "keys.json", rate=1) as server:
        first, second = (server.post("/v1/demo-vegart", headers={"x-api-key": key}) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    assert 58 <= int(second.headers["retry-after"]) <= 60


def test_every_sample_counts(tmp_path: Path) -> None:
    key = keys.add(tmp_path / "keys.json", "me")
    with running(tmp_path / "data", api_keys=tmp_path / "keys.json", rate=8) as server:
        body = {"prompt": "a star", "samples": 4, "base64": True, "num_inference_steps": 1}
        asked = [
            ("/v1/demo-vegart", body),
            ("/v2/demo-vegart", {**body, "samples": 3}),
            ("/v1/demo-vegart", {**body, "base64": False}),
        ]
        statuses = [server.post(path, sent, headers={"x-api-key": key}).status_code for path, sent in asked]
        assert statuses == [200, 200, 200]  # 4, 3, and 1 of which a JPEG is
        assert server.post("/v1/demo-vegart", headers={"x-api-key": key}).status_code == 429


def test_a_second_head_has_as_long_as_the_first_and_a_page_as_long_as_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vega_edge.serve.protocols.HEAD_S", 0.5)
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


def test_a_poll_that_is_held_ends_with_its_time_and_with_the_server(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        url = server.post("/v2/demo-vegart").json()["status_url"]
        gate.wait()

        def seconds(**hold: Any) -> float:
            start = time.monotonic()
            assert server.http.get(url, params=hold).json()["status"] == "PROCESSING"
            return time.monotonic() - start

        assert 0.9 <= seconds() < 8
        assert min(seconds(hold=0) for _ in range(5)) < 0.9  # the quickest, since a busy machine delays some of them
        assert 2.4 <= seconds(hold="2.5") < 10
        threading.Timer(0.3, server.service.queue.release_polls).start()
        start = time.monotonic()
        assert server.ended(url).json()["status"] == "PROCESSING"
        assert server.ended(url).json()["status"] == "PROCESSING"  # nor is another one held
        assert time.monotonic() - start < 10  # half of what it would be held for
        gate.let(50)


@pytest.mark.parametrize("hold", ["20.1", "-1", "nan", "inf", "long", "", "1s", "9" * 400])
def test_a_hold_that_can_not_be_is_refused(tmp_path: Path, hold: str) -> None:
    with running(tmp_path) as server:
        answer = server.http.get("/v2/requests/" + "0" * 32 + "/status", params={"hold": hold})
        assert answer.status_code == 400
        assert answer.json()["error"] == f"hold: must be seconds from 0 to 20, got {hold[:80]!r}"


def test_a_signal_to_stop_is_heard_at_once_by_those_who_wait(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        url = server.post("/v2/demo-vegart").json()["status_url"]
        gate.wait()
        loop = server.service.queue._loop
        assert loop is not None
        stop = (loop.call_soon_threadsafe, (server.server.handle_exit, signal.SIGTERM, None))
        threading.Timer(0.3, *stop).start()
        start = time.monotonic()
        assert server.ended(url).json()["status"] == "PROCESSING"
        assert time.monotonic() - start < 10 and server.service.stopping  # half of what it would be held for
        gate.let(50)


def test_while_the_running_picture_is_finished_who_calls_is_told(tmp_path: Path) -> None:
    """By connections of their own, as a supervisor and a load balancer do."""
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server, httpx.Client(timeout=60, trust_env=False) as other:
        drawn: list[int] = []
        client = threading.Thread(
            target=lambda: drawn.append(other.post(f"{server.url}/v1/demo-vegart", json={"prompt": "a"}).status_code)
        )
        client.start()
        gate.wait()
        with connect(server.url.replace("http", "ws") + "/live", proxy=None) as page:
            assert json.loads(page.recv(timeout=20))["type"] == "ready"
            server.server.should_exit = True
            with pytest.raises(ConnectionClosed) as closed:
                page.recv(timeout=20)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        answers = {}
        for path in ("/readyz", "/healthz", "/v2/requests/x", "/"):
            answers[path] = httpx.get(server.url + path, trust_env=False)
        assert {path: a.status_code for path, a in answers.items()} == {
            "/readyz": 503,
            "/healthz": 200,
            "/v2/requests/x": 503,
            "/": 503,
        }
        assert answers["/readyz"].json() == {"ready": False, "why": ["shutting down"]}
        assert answers["/"].json() == {"error": "the server is shutting down; try again in a moment"}
        assert answers["/"].headers["retry-after"] == "5"
        gate.let(50)
        client.join(20)
        assert drawn == [200]
        wait_until(lambda: not server.server.server_state.connections)
        with pytest.raises(OSError, match="refused"):
            wait_until(lambda: socket.create_connection(("127.0.0.1", server.service.settings.port), 5).close(), 5)


def test_a_page_that_is_open_to_the_end_does_not_spoil_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    with running(tmp_path) as server:
        page = connect(server.url.replace("http", "ws") + "/live", proxy=None)
        assert json.loads(page.recv(timeout=20))["type"] == "ready"
    with page, pytest.raises(ConnectionClosed) as closed:
        page.recv(timeout=20)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    assert faults == []
