"""Ten thousand wrong requests: never a 5xx, never a hang, and the next good one works.

A thousand in a normal run; VEGA_EDGE_FUZZ=10000 for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from .serve_fakes import FakeDrawer
from .serve_running import Running, running

COUNT = int(os.environ.get("VEGA_EDGE_FUZZ", "1000"))
pytestmark = pytest.mark.timeout(600 + COUNT // 5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("fuzz"), FakeDrawer(), queue=10_000) as server:
        yield server


def good(server: Running) -> None:
    answer = server.post("/v1/demo-vegart")
    assert answer.status_code == 200, answer.text


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 4, 5, 25, 64, 100, 128, 256, 1024, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e308,
    -1e308, 5e-324, "", " ", "0", "-1", "4", "1e9", "1e999", "nan", "inf", "٣", "１２", "0x10", "1_000", "true", "a" * 5000, "\0", "\ud800",
    "é" * 300, "../../etc/passwd", "a\r\nset-cookie: x=1", "<script>", "DDIM", "Euler a", "dpmpp_2m", "DPM adaptive", "UniPC", "PLMS", "🦊" * 100,
    "<|endoftext|>", [], [1], [[]], {}, {"a": {"b": []}}, ["a"] * 500,
]  # fmt: skip
FIELDS = ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "samples", "scheduler", "seed", "img_width", "img_height",
          "base64", "style", "width", "__proto__", "self", "client"]  # fmt: skip
KINDS = ["application/json", "application/json; charset=utf-16", "text/plain", "", "multipart/form-data", "multipart/form-data; boundary=x", "\xff", "application/x-www-form-urlencoded"]  # fmt: skip
PATHS = ["/v1/demo-vegart", "/v2/demo-vegart", "/v1/segmind-vega", "/v2/smallsd1.5-txt2img", "/v1/nope", "/v2/..%2f..", "/v1//demo-vegart", "/v1/%00", "/v1/models/demo-vegart",
         "/v2/requests/..%2f..%2fjobs.sqlite", "/v2/requests/%F0%9F%A6%8A/status", "/v1/requests/' OR 1=1 --", "/generations/../jobs.sqlite", "/generations/%2e%2e%2fjobs.sqlite",
         "/generations/" + "A" * 32 + ".jpeg", "/generations/.x.part", "/page/../app.py", "/page/index.html", "/", "/live", "/metrics", "/openapi.json", "/" + "a" * 3000]  # fmt: skip
METHODS = ["POST"] * 12 + ["GET", "GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"]


def wrong_body(draw: random.Random) -> bytes:
    kind = draw.randrange(9)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return b"[" * draw.randrange(1, 60_000)
    if kind == 2:
        return b'{"a":' * draw.randrange(1, 10_000)
    if kind == 8:  # a form, whole or not: parts in parts, parts without a name, files
        part = draw.choice([b"Content-Type:message/rfc822\r\n\r\n", b"Content-Disposition: form-data; name=prompt\r\n\r\na\r\n--x\r\n", b"Content-Disposition: form-data\r\n\r\n", b"Content-Disposition: form-data; name=prompt; filename=a\r\n\r\n\xff\r\n--x\r\n", b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n"])  # fmt: skip
        return b"--x\r\n" + part * draw.choice([1, 3, 70, 500]) + draw.choice([b"", b"--x--\r\n", b"\0"])
    body = {name: draw.choice(VALUES) for name in draw.sample(FIELDS, draw.randrange(len(FIELDS)))}
    if kind > 3:
        body["prompt"] = "a star"
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == 3:
        cut = draw.randrange(len(text) + 1)
        return text[:cut] + draw.randbytes(3) + text[cut:]
    return text.replace(b"1e+308", draw.choice([b"NaN", b"-Infinity", b"1e99999"]))


def test_hand_made_requests(server: Running) -> None:
    draw, statuses = random.Random(6), Counter[int]()
    for number in range(COUNT):
        method, path = draw.choice(METHODS), draw.choice(PATHS)
        headers = (
            {"content-type": draw.choice(KINDS).encode("latin-1")}
            if draw.random() < 0.3
            else {"content-type": b"application/json"}
        )
        body = wrong_body(draw)
        if body.startswith(b"--x"):
            headers = {"content-type": b"multipart/form-data; boundary=x" + draw.choice([b"", b"; charset=idna"])}
        answer = server.http.request(method, path, content=body, headers=headers)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (number, method, path, headers, body[:500], answer.text)
        if answer.status_code >= 400 and method != "HEAD" and answer.headers["content-type"] == "application/json":
            assert isinstance(answer.json().get("error"), str), (number, answer.text)
            assert "Traceback" not in answer.text
        if number % 200 == 0:
            good(server)
    good(server)
    assert {200, 400, 404, 405, 406} <= set(statuses)


def test_wrong_values_and_the_real_model(tmp_path: Path) -> None:
    """Right values among wrong ones, so that many reach the pipeline, which has checks of its own."""
    draw, statuses = random.Random(9), Counter[int]()
    right = {"prompt": "a red star", "num_inference_steps": 1, "img_width": 64, "img_height": 64, "samples": 1}
    with running(tmp_path, real=True) as server:
        for number in range(COUNT // 20):
            changed = {name: draw.choice(VALUES) for name in draw.sample(FIELDS, draw.randrange(3))}
            body = {**right, **changed, "num_inference_steps": draw.choice([1, 2, 0, 51, "1"])}
            text = json.dumps(body).encode("utf-8", "surrogatepass")
            answer = server.http.post(
                draw.choice(PATHS[:4]), content=text, headers={"content-type": "application/json"}
            )
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (number, body, answer.text)
        good(server)
    assert {200, 400} <= set(statuses)


def test_raw_connections(server: Running) -> None:
    """What no client sends: broken heads, wrong lengths, two requests at once, connections that are left half open."""
    draw = random.Random(7)
    heads = [b"GET / HTTP/1.1\r\n", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"\0" * 100, b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
             b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
             b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20, b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
             b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n",
             b"GET http://evil.com/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"]  # fmt: skip
    half_open = []
    for number in range(COUNT // 10):
        data = draw.choice(heads)
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))] + draw.randbytes(draw.randrange(20))
        client = socket.create_connection(("127.0.0.1", server.service.settings.port), timeout=20)
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            client.sendall(data)
            if draw.random() < 0.5:
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    assert b" 500 " not in client.recv(4096)
        if draw.random() < 0.2:
            half_open.append(client)
        else:
            client.close()
        if number % 50 == 0:
            good(server)
    good(server)
    for client in half_open:
        client.close()


def test_socket_garbage(server: Running) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    draw = random.Random(8)
    for _ in range(max(2, COUNT // 100)):
        with (
            connect(server.url.replace("http", "ws") + "/live", proxy=None) as client,
            contextlib.suppress(ConnectionClosed),
        ):
            for _ in range(20):
                body: dict[str, Any] = {
                    name: draw.choice(VALUES)
                    for name in draw.sample([*FIELDS, "id", "slot", "previews", "format", "model", "key"], 6)
                }
                text = json.dumps({**body, "type": draw.choice(["draw", "draw", "stop", "hello", None, 3, []])})
                client.send(draw.choice([text, text, text, text.encode(), draw.randbytes(50), "[" * 1000]))
    with connect(server.url.replace("http", "ws") + "/live", proxy=None) as client:
        client.send(json.dumps({"type": "draw", "id": 1, "prompt": "a star", "previews": "off"}))
        assert json.loads(client.recv(timeout=30))["type"] == "ready"
        assert isinstance(client.recv(timeout=30), bytes)
    good(server)
    assert server.http.get("/healthz").status_code == 200


def test_schemathesis_on_the_description(server: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    seen = Counter[int]()
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        every = settings(
            max_examples=max(3, COUNT // 50),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        for mode in schemathesis.GenerationMode:

            @every
            @given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                if "/status" in case.path:  # a job that exists is waited for
                    case.path_parameters["request_id"] = "x"
                answer = case.call(base_url=server.url, timeout=60)
                seen[answer.status_code] += 1
                assert answer.status_code < 500 or case.path == "/readyz", answer.text

            with contextlib.suppress(Unsatisfiable):  # there is no wrong request where nothing is asked for
                attempt()
    assert seen[200] and seen[400]
    good(server)
