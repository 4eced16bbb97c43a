"""The wire format of Segmind's API, as its pages and clients have it: routes, parameters, headers, statuses, safety."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import EngineError, UsageError, VegaEdgeError
from vega_edge.models import recipes
from vega_edge.serve import keys, memory, openapi, params
from vega_edge.serve.catalog import Entry, api_pages, catalog
from vega_edge.serve.guard import Guard
from vega_edge.serve.service import build
from vega_edge.serve.settings import Settings

from .serve_fakes import FakeDrawer, Gate
from .serve_running import ALIASES, Running, running, wait_until

V1 = "/v1/demo-vegart"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serve")) as server:
        yield server


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return image


def test_v1_answers_a_jpeg_with_the_headers_that_clients_read(server: Running) -> None:
    answer = server.post(V1, {"prompt": "a star", "seed": 200})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    image = picture(answer.content)
    assert image.size == (64, 64) or image.size == (128, 128)
    assert abs(image.convert("RGB").getpixel((5, 5))[0] - 200) < 4
    assert answer.headers["x-seed-value"] == "200"
    assert float(answer.headers["X-remaining-credits"]) > 0
    assert float(answer.headers["x-generation-time"]) >= 0
    assert {"x-cost", "x-request-id", "x-output-metadata"} <= set(answer.headers)
    assert json.loads(answer.headers["x-output-metadata"]) == dict(zip(("width", "height"), image.size, strict=True))


def test_the_jpeg_carries_its_parameters(server: Running) -> None:
    image = picture(server.post(V1, {"prompt": "a star", "seed": 9}).content)
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    text = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert text.startswith("a star\nSteps: 4, Sampler: LCM, CFG scale: 0, Seed: 9,")


def test_v1_with_base64(server: Running) -> None:
    one = server.post(V1, {"prompt": "a star", "base64": True}).json()
    assert set(one) == {"image", "status", "infer_time", "outputs"} and one["status"] == "Success"
    picture(base64.b64decode(one["image"], validate=True))
    several = server.post(V1, {"prompt": "a star", "base64": "true", "samples": "3"}).json()
    assert len(several["image"]) == several["outputs"] == 3
    assert len({base64.b64decode(text) for text in several["image"]}) == 3


def test_several_samples_without_base64_are_one_picture_and_it_says_so(server: Running) -> None:
    drawn = server.service.metrics.registry.get_sample_value
    before = drawn("vega_edge_pictures_total", {"model": "demo-vegart"}) or 0
    answer = server.post(V1, {"prompt": "a star", "samples": 3})
    picture(answer.content)
    assert drawn("vega_edge_pictures_total", {"model": "demo-vegart"}) == before + 1
    assert answer.headers["x-vega-edge-adjusted"] == "samples=1 (base64 true gives all)"


def test_a_random_seed_is_told(server: Running) -> None:
    seeds = {server.post(V1).headers["x-seed-value"] for _ in range(3)}
    assert len(seeds) == 3


def test_numbers_in_quotes_unknown_fields_and_old_names(server: Running) -> None:
    body = {"prompt": "a star", "num_inference_steps": "3", "guidance_scale": " 0 ", "seed": "999999999999999",
            "img_width": "128", "scheduler": "dpmpp_2m", "style": "base", "refiner": True, "negative_prompt": None}  # fmt: skip
    answer = server.post(V1, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-seed-value"] == "999999999999999"
    form = server.http.post(
        V1, files={k: (None, v) for k, v in {"prompt": "ein ★", "seed": "5", "base64": "false"}.items()}
    )
    assert (form.status_code, form.headers["x-seed-value"]) == (200, "5")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "prompt: must be text, got nothing"),
        ({"prompt": 3}, "prompt: must be text, got a number"),
        ({"prompt": "x" * 4001}, "prompt: must be at most 4000 characters, got 4001"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be from 1 to 50, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: must be a whole number, got 2.5"),
        ({"num_inference_steps": "many"}, "num_inference_steps: must be a number, got 'many'"),
        ({"guidance_scale": True}, "guidance_scale: must be a number, got a truth value"),
        ({"guidance_scale": "nan"}, "guidance_scale: must be a number of a sensible size, got nan"),
        ({"guidance_scale": [7]}, "guidance_scale: must be a number, got a list"),
        ({"seed": 10**400}, "seed: must be a number of a sensible size, got 1000000000000000000000000000000000000..."),
        ({"seed": 10**15}, "seed: must be from -1 to 999999999999999, got 1000000000000000"),
        ({"samples": 5}, "samples: must be from 1 to 4, got 5"),
        ({"img_width": 8192}, "img_width: must be from 64 to 256, got 8192"),
        ({"img_width": 100}, "width must be a multiple of 64 px, got 100; nearest: 64 or 128"),
        ({"base64": "maybe"}, "base64: must be true or false, got text"),
        ({"scheduler": 7}, "scheduler: must be text, got a number"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(server: Running, body: dict[str, Any], text: str) -> None:
    full = {"prompt": "a star", **body} if body else {}
    answer = server.http.post(V1, content=json.dumps(full), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (400, {"error": text})


def test_an_unknown_scheduler_lists_the_known(server: Running) -> None:
    answer = server.post(V1, {"prompt": "a", "scheduler": "Eular"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("unknown scheduler 'Eular'; did you mean 'Euler'? there are: ")


@pytest.mark.parametrize(
    ("content", "kind", "status", "text"),
    [
        (b"{", "application/json", 400, "the body is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"[1]", "application/json", 400, "the body must be a JSON object with a prompt, got a list"),
        (b"[" * 60000, "application/json", 400, "the body is not JSON that can be read: it is nested too deep"),
        (b'{"prompt": "a", "seed": NaN}', "application/json", 400, "the body is not JSON: NaN is not a number in JSON"),
        (b"\xff\xfe", "application/json", 400, None),
        (b'{"prompt": "a"}', "text/plain", 406, "Invalid content type 'text/plain'; send application/json"),
        (b'{"prompt": "a"}', None, 406, "Invalid content type 'none'; send application/json"),
        (b"garbage", "multipart/form-data", 400, "the body is not the form that its content type says"),
        (b"--x\r\n" + b"Content-Type:message/x\r\n\r\n" * 2000, "multipart/form-data; boundary=x", 400, "the body is not the form that its content type says"),
        (b"x" * 70000, "application/json", 413, "the body is longer than 65536 bytes"),
    ],
)  # fmt: skip
def test_wrong_bodies(server: Running, content: bytes, kind: str | None, status: int, text: str | None) -> None:
    answer = server.http.post(V1, content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert text is None or answer.json()["error"] == text


def test_half_a_surrogate_pair_in_a_prompt_is_drawn(server: Running) -> None:
    for version in (1, 2):
        answer = server.http.post(
            f"/v{version}/demo-vegart", content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"}
        )
        assert answer.status_code == 200, answer.text
    result = server.ended(answer.json()["status_url"]).json()
    assert result["status"] == "COMPLETED"
    assert server.http.get(answer.json()["response_url"]).json()["prompt"] == "\ufffd"


@pytest.mark.parametrize("path", [V1, "/v2/demo-vegart"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
    with caplog.at_level("INFO", "vega_edge.serve.requests"), running(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.service.settings.port), timeout=20) as client:
            client.sendall(head.encode())
            time.sleep(0.2)
        wait_until(lambda: f'"path": "{path}"' in caplog.text)
        counted = f'vega_edge_responses_total{{route="{path.replace("demo-vegart", "{slug}")}",status="499"}} 1.0'
        assert counted in server.http.get("/metrics").text
    (line,) = [json.loads(r.message) for r in caplog.records if f'"path": "{path}"' in r.message]
    assert (line["status"], line["left"]) == (499, True)
    assert "defect" not in caplog.text


def test_a_long_body_without_its_length_is_cut_off(server: Running) -> None:
    answer = server.http.post(V1, content=iter([b"x" * 40000] * 2), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_statuses_of_wrong_addresses(server: Running) -> None:
    assert server.http.get(V1).status_code == 405
    assert server.http.get("/nothing").status_code == 404
    unknown = server.post("/v1/nothing")
    assert unknown.status_code == 404
    assert unknown.json()["error"] == f"unknown model 'nothing'; there are: {', '.join(sorted(server.service.entries))}"
    for path in ("/v1/nothing", "/v2/requests/x", "/generations/..%2f..%2fjobs.sqlite", "/page/..%2fapp.py", V1 + "/"):
        answer = server.http.get(path)
        assert answer.status_code in (404, 405) and set(answer.json()) == {"error"}
        assert not answer.is_redirect


def test_a_model_without_a_bundle_says_what_to_do(server: Running) -> None:
    if recipes()["demo-vega"].ready:
        pytest.skip("demo-vega is exported on this machine")
    answer = server.post("/v1/demo-vega")
    assert answer.status_code == 404
    assert answer.json()["error"].endswith("or let another stand in: --alias demo-vega=MODEL")


def test_v2_from_submit_to_picture(server: Running) -> None:
    submitted = server.post("/v2/segmind-vega", {"prompt": "a star", "seed": 7, "samples": 2}).json()
    job = submitted["request_id"]
    assert submitted == {
        "request_id": job, "status": "QUEUED", "poll_url": f"{server.url}/v1/requests/{job}",
        "status_url": f"{server.url}/v2/requests/{job}/status", "response_url": f"{server.url}/v2/requests/{job}",
    }  # fmt: skip
    status = server.ended(submitted["status_url"]).json()
    assert (status["status"], status["request_id"]) == ("COMPLETED", job)
    assert set(status["metrics"]) == {"inference_time", "queue_time", "total_time", "cost", "remaining_credits"}
    for url in (submitted["response_url"], submitted["poll_url"]):
        result = server.http.get(url).json()
        assert (result["status"], result["seed"], result["prompt"], result["error"]) == (
            "COMPLETED",
            "7",
            "a star",
            None,
        )
        assert result["output"] == result["images"][0]["url"] and len(result["images"]) == 2
        for image in result["images"]:
            got = server.http.get(image["url"])
            picture(got.content)
            assert image["file_size"] == str(len(got.content)) and image["file_name"] in image["url"]
            assert image["content_type"] == got.headers["content-type"] == "image/jpeg"


def test_v2_accepts_wrong_parameters_and_fails_the_job(server: Running) -> None:
    submitted = server.post("/v2/demo-vegart", {"prompt": 1})
    assert submitted.status_code == 200
    for url in (submitted.json()["status_url"], submitted.json()["response_url"]):
        answer = server.http.get(url)
        assert answer.status_code == 422
        assert (answer.json()["status"], answer.json()["error"]) == ("FAILED", "prompt: must be text, got a number")
    assert server.http.post("/v2/demo-vegart", content=b"{").status_code == 406
    assert server.post("/v2/nothing").status_code == 404


def test_an_unknown_request(server: Running) -> None:
    for path in ("/v2/requests/{}", "/v2/requests/{}/status", "/v1/requests/{}"):
        for job in ("0" * 32, "no-such", "%00"):
            answer = server.http.get(path.format(job))
            assert answer.status_code == 404
        assert server.http.get(path.format("no-such")).json() == {"error": "Request no-such not found"}


def test_base64_on_v2_adds_the_picture_to_the_url(server: Running) -> None:
    submitted = server.post("/v2/demo-vegart", {"prompt": "a", "base64": True}).json()
    server.ended(submitted["status_url"])
    result = server.http.get(submitted["response_url"]).json()
    assert base64.b64decode(result["image"]) == server.http.get(result["output"]).content


def test_urls_are_those_by_which_the_client_calls(server: Running) -> None:
    answer = server.post("/v2/demo-vegart", headers={"host": "localhost:99"}).json()
    assert answer["status_url"].startswith("http://localhost:99/v2/requests/")


def test_a_poll_is_held_until_the_job_has_ended(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        submitted = server.post("/v2/demo-vegart").json()
        gate.wait()
        wait_until(lambda: server.http.get(submitted["response_url"]).json()["status"] == "PROCESSING")
        start = time.monotonic()
        threading.Timer(1.0, gate.let, (20,)).start()
        status = server.ended(submitted["status_url"])
        assert status.json()["status"] == "COMPLETED" and time.monotonic() - start >= 0.9


def test_a_v1_client_that_leaves_cancels_its_job(tmp_path: Path) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    with running(tmp_path, drawer) as server:
        body = json.dumps({"prompt": "left", "num_inference_steps": 50}).encode()
        with socket.create_connection(("127.0.0.1", server.service.settings.port)) as client:
            client.sendall(
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (V1.encode(), len(body))
                + body
            )
            gate.wait()
        wait_until(lambda: all(w.jobs[0].cancelled for w in server.service.worker._walks.values()))
        gate.let(60)
        assert server.post(V1).status_code == 200
        assert len([step for step in drawer.steps if step[0] == "left"]) <= 2


def test_overload_is_429_with_retry_after_and_heals(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate), queue=2) as server:
        jobs = [server.post("/v2/demo-vegart") for _ in range(2)]
        gate.wait()
        jobs += [server.post("/v2/demo-vegart") for _ in range(3)]
        assert sorted(job.status_code for job in jobs) in ([200, 200, 200, 200, 429], [200, 200, 200, 429, 429])
        refused = next(job for job in jobs if job.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"].startswith("the queue is full (2 jobs wait); try again in ")
        gate.let(500)
        for job in jobs:
            if job.status_code == 200:
                assert server.ended(job.json()["status_url"]).json()["status"] == "COMPLETED"
        assert server.post(V1).status_code == 200


def test_an_engine_that_raises_is_a_clear_500_and_the_rest_goes_on(tmp_path: Path) -> None:
    def before(request: Any, index: int) -> None:
        if request.prompt == "engine":
            raise EngineError("onnxruntime-cpu failed at step 1")
        if request.prompt == "defect":
            raise ZeroDivisionError("secret detail")

    with running(tmp_path, FakeDrawer(before_step=before)) as server:
        engine, defect = (server.post(V1, {"prompt": p}) for p in ("engine", "defect"))
        assert (engine.status_code, engine.json()) == (500, {"error": "onnxruntime-cpu failed at step 1"})
        assert (defect.status_code, defect.json()) == (500, {"error": "an internal error; it is in the log"})
        job = server.post("/v2/demo-vegart", {"prompt": "defect"}).json()
        failed = server.ended(job["status_url"])
        assert (failed.status_code, failed.json()["error"]) == (422, "an internal error; it is in the log")
        assert server.post(V1).status_code == 200
        assert 'vega_edge_errors_total{kind="ZeroDivisionError"}' in server.http.get("/metrics").text


def test_metrics_health_and_description(server: Running) -> None:
    server.post(V1)
    text = server.http.get("/metrics").text
    for name in ("vega_edge_queue_length 0.0", 'vega_edge_stage_seconds_bucket{le="0.01",model="demo-vegart",stage="decode"}',
                 'vega_edge_pictures_total{model="demo-vegart"}', "process_resident_memory_bytes", "vega_edge_model_swap_seconds_count",
                 'vega_edge_responses_total{route="/v1/{slug}",status="200"}', "vega_edge_models_bytes"):  # fmt: skip
        assert name in text
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"ready": True, "why": []}
    described = server.http.get("/openapi.json").json()
    assert {f"/v{n}/{slug}" for n in (1, 2) for slug in ALIASES} <= set(described["paths"])
    schema = described["paths"]["/v1/segmind-vega"]["post"]["requestBody"]["content"]["application/json"]
    assert schema["example"]["seed"] == 1232788698
    operation = described["paths"]["/v1/demo-vegart"]["post"]
    asked = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["num_inference_steps"]
    assert (asked["minimum"], asked["maximum"]) == (1, 50)
    strict = openapi._operation(entry_of("segmind-vega"), "segmind", "", {}, "v1")["requestBody"]
    local = openapi._operation(entry_of("segmind-vega"), "local", "", {}, "v1")["requestBody"]
    steps = [
        each["content"]["application/json"]["schema"]["properties"]["num_inference_steps"] for each in (strict, local)
    ]
    assert [(s["default"], s["minimum"], s["maximum"]) for s in steps] == [(25, 20, 100), (25, 1, 50)]
    assert {"401", "403", "500", "503"} <= set(operation["responses"])
    status = described["paths"]["/v2/requests/{request_id}/status"]["get"]
    (hold,) = [each["schema"] for each in status["parameters"] if each["name"] == "hold"]
    assert (hold["minimum"], hold["maximum"], hold["default"]) == (0, 20, 1)
    assert {"200", "400", "404", "422"} <= set(status["responses"])
    assert server.http.get("/docs").status_code == 200


def test_the_description_says_which_models_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Running
) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    described = server.http.get("/openapi.json").json()["paths"]
    for version in ("v1", "v2"):
        told = described[f"/{version}/demo-vega"]["post"]["summary"]
        assert told == "Not here; make it with: vega-edge export demo-vega"
        assert not described[f"/{version}/segmind-vega"]["post"]["summary"].startswith(
            "Not here"
        )  # an alias of one that is


def test_one_line_a_request_and_prompts_only_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for prompts in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "vega_edge.serve.requests"), running(tmp_path, log_prompts=prompts) as server:
            server.post(V1, {"prompt": "a secret wish", "seed": 3})
        lines = [json.loads(r.message) for r in caplog.records if r.name == "vega_edge.serve.requests"]
        (line,) = [line for line in lines if line["path"] == V1]
        assert (line["status"], line["model"], line["seed"], line["client"]) == (200, "demo-vegart", 3, "127.0.0.1")
        assert {"time", "id", "ms", "queue_s", "draw_s"} <= set(line)
        assert ("prompt" in line) == prompts == ("a secret wish" in json.dumps(lines))


# Safety


def test_other_web_pages_and_rebound_names_are_refused(server: Running) -> None:
    for host in ("evil.com", "evil.com:8000", "", "127.0.0.1.evil.com", "[", "a@127.0.0.1", "127.0.0.1/"):
        answer = server.http.get("/healthz", headers={"host": host})
        assert answer.status_code == 400, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "192.168.1.5:80"):
        assert server.http.get("/healthz", headers={"host": host}).status_code == 200, host
    for origin, status in (("http://evil.com", 403), ("null", 403), ("http://127.0.0.1:1", 403), (server.url, 200)):
        assert server.post(V1, headers={"origin": origin}).status_code == status, origin
    assert server.http.get("/healthz", headers={"origin": "http://evil.com"}).status_code == 200


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, other = keys.add(file, "kiosk"), keys.add(file, "office")
    assert key.startswith("SG_") and key not in file.read_text()
    with running(tmp_path, api_keys=file, rate=5) as server:
        none = server.post(V1)
        assert (none.status_code, none.json()) == (401, {"error": "Missing Authorization or x-api-key in header"})
        wrong = server.post(V1, headers={"x-api-key": "SG_wrong"})
        assert (wrong.status_code, wrong.json()) == (
            401,
            {"error": "Unauthorized. API key is invalid or may have expired."},
        )
        for header in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            assert server.post(V1, headers=header).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json"):
            asked = server.http.get(path)
            assert asked.status_code == 401 and asked.headers["www-authenticate"].startswith("Basic")
            assert server.http.get(path, auth=("any", key)).status_code == 200
        for path in ("/", "/healthz", "/readyz"):
            assert server.http.get(path).status_code == 200
        assert server.http.get("/v2/requests/x").status_code == 401
        statuses = [server.post(V1, headers={"x-api-key": key}).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert server.post(V1, headers={"x-api-key": other}).status_code == 200
        time.sleep(1.1)
        keys.revoke(file, "office")
        assert server.post(V1, headers={"x-api-key": other}).status_code == 401


def test_a_key_file_that_is_deleted_or_damaged_while_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.json"
    key = keys.add(file, "me")
    good, known = file.read_text(), keys.KeyFile(file)
    file.write_text("half written")
    assert [known.owner(key) for _ in range(3)] == ["me"] * 3
    assert caplog.text.count("is not a file of keys") == 1
    file.unlink()
    assert known.owner(key) is None
    assert (
        f"{file} does not exist; make it: vega-edge serve keys add NAME --api-keys {file}; no key is known now"
        in caplog.text
    )
    file.write_text(good)
    assert known.owner(key) == "me"
    assert known.owner("\ud800") is None


def test_key_files_that_are_wrong(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for call, text in (
        (lambda: keys.load(file), f"{file} does not exist; make it: vega-edge serve keys add NAME --api-keys {file}"),
        (lambda: keys.add(file, "a b"), "a key's name is 1 to 64 letters, digits, or _ . @ -, got 'a b'"),
    ):
        with pytest.raises(VegaEdgeError) as failure:
            call()
        assert str(failure.value) == text
    keys.add(file, "me")
    with pytest.raises(UsageError) as failure:
        keys.add(file, "me")
    assert str(failure.value) == f"{file} has a key named 'me'; revoke it first, or choose another name"
    with pytest.raises(UsageError, match="unknown key 'mee'; did you mean 'me'"):
        keys.revoke(file, "mee")
    file.write_text("[]")
    with pytest.raises(VegaEdgeError, match="is not a file of keys"):
        keys.load(file)
    for sha256 in (5, "ab", "É" * 64):
        file.write_text(json.dumps({"keys": [{"name": "me", "sha256": sha256, "created": ""}]}))
        with pytest.raises(VegaEdgeError) as damaged:
            keys.load(file)
        why = "the key 'me' has no sha256 of 64 lower-case hex digits"
        assert str(damaged.value) == f"{file} is not a file of keys: {why}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"host": "0.0.0.0"}, "others can reach 0.0.0.0; give --api-keys FILE (make one: vega-edge serve keys add NAME --api-keys FILE), or say --no-auth"),
        ({"limits": "x"}, "--limits must be one of local, segmind, got 'x'"),
        ({"trusted_proxies": ("x",)}, "--trusted-proxy must be an address or a network, got 'x'"),
        ({"api_keys": Path("k"), "no_auth": True}, "--api-keys and --no-auth exclude each other; leave one of them out"),
        ({"port": 65536}, "--port must be from 0 to 65535, got 65536"),
        ({"queue": 0}, "--queue must be from 1 to 100000, got 0"),
        ({"rate": -5}, "--rate must be from 0 to 1000000, got -5"),
        ({"sockets": -1}, "--sockets must be from 1 to 10000, got -1"),
        ({"prompt_chars": 0}, "--prompt-chars must be from 1 to 65536, got 0"),
        ({"batch": 0}, "--batch must be from 1 to 64, got 0"),
        ({"job_s": float("nan")}, "--job-seconds must be from 1 to 86400, got nan"),
        ({"grace_s": float("inf")}, "--grace-seconds must be from 0 to 86400, got inf"),
        ({"keep_s": 0.0}, "--keep-seconds must be from 1 to 31536000, got 0.0"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as failure:
        Settings(Path("data"), **options)
    assert str(failure.value) == text
    Settings(Path("data"), host="0.0.0.0", no_auth=True)
    Settings(Path("data"), host="::1")


def test_forwarded_headers_count_from_trusted_proxies_only(tmp_path: Path) -> None:
    forwarded = {"x-forwarded-for": "10.0.0.9", "x-forwarded-proto": "https", "x-forwarded-host": "draw.example"}
    with running(tmp_path, hosts=("draw.example",)) as server:
        assert server.post("/v2/demo-vegart", headers=forwarded).json()["status_url"].startswith(server.url)
    with running(tmp_path, hosts=("draw.example",), trusted_proxies=("127.0.0.0/8",)) as server:
        url = server.post("/v2/demo-vegart", headers=forwarded).json()["status_url"]
        assert url.startswith("https://draw.example/v2/requests/")


def test_while_it_stops_new_requests_are_503(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.service.stopping = True
        answer = server.post(V1)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert server.http.get("/readyz").json() == {"ready": False, "why": ["shutting down"]}
        assert server.http.get("/healthz").status_code == 200
        server.service.stopping = False


def test_slow_and_half_open_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vega_edge.serve import protocols, service

    monkeypatch.setattr(protocols, "HEAD_S", 0.5)
    monkeypatch.setattr(service, "BODY_S", 0.5)
    with running(tmp_path, connections=8) as server:
        port = server.service.settings.port
        head = b"POST /v1/demo-vegart HTTP/1.1\r\nHost: localhost\r\n"
        for sent, answer in (
            (b"", b""),
            (b"GET /heal", b""),
            (head, b""),
            (head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"HTTP/1.1 408"),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(sent)
                assert client.recv(12) == answer, sent
        crowd = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(10)]
        assert server.http.get("/healthz").status_code == 200  # which the oldest of them make room for
        for client in crowd:
            client.close()


# Pages and parameters


def test_other_spellings_of_a_model_have_its_page() -> None:
    entries, pages = catalog({}), api_pages()
    for slug, page in (("segmind-vegart", "segmind-vega-rt-v1"), ("small-sd", "smallsd1.5-txt2img"), ("portrait", "potraitsd1.5-txt2img"),
                       ("portraitsd1.5-txt2img", "potraitsd1.5-txt2img"), ("dynavis-lightning", "sdxl1.0-dyanvis-lightning")):  # fmt: skip
        assert entries[slug].has_page and entries[slug].parameters == pages[page]["parameters"], slug
    assert not entries["demo-vegart"].has_page and not entries["ssd-1b"].has_page
    with pytest.raises(UsageError, match="num_inference_steps: must be from 20 to 100, got 4; --limits local"):
        params.read({"prompt": "a", "num_inference_steps": 4}, entries["small-sd"], "segmind", 4000)


def test_the_name_that_it_listens_on_is_its_own(tmp_path: Path) -> None:
    guard = Guard(None, build(Settings(tmp_path, host="Draw.Example", no_auth=True), lambda name: FakeDrawer()))
    assert guard._is_ours("draw.example:8000") and not guard._is_ours("example:8000")


def test_memory_is_told_without_proc() -> None:
    assert 10e6 < memory.resident_bytes() < 1e12


def entry_of(slug: str) -> Entry:
    page = api_pages()[slug]
    return Entry(slug, recipes()["demo-vegart"], page["parameters"], page["example"], has_page=True)


@pytest.mark.parametrize("slug", sorted(ALIASES))
def test_a_page_with_defaults_and_its_own_example(slug: str) -> None:
    entry = entry_of(slug)
    asked = params.read({"prompt": "a"}, entry, "segmind", 4000)
    defaults = {n: s["default"] for n, s in entry.parameters.items() if "default" in s and n not in ("base64", "seed")}
    assert {params._OPTIONS[n]: v for n, v in defaults.items()} == {
        k: v for k, v in asked.options.items() if k != "seed"
    }
    example = params.read(entry.example, entry, "segmind", 4000)
    assert example.options["steps"] == entry.example["num_inference_steps"]


def test_limits_of_the_page_and_of_this_box() -> None:
    entry = entry_of("segmind-vega")
    for body, text in (
        ({"num_inference_steps": 19}, "num_inference_steps: must be from 20 to 100, got 19; --limits local allows what the model can do"),
        ({"img_width": 512}, "img_width: must be one of 1024, got 512; --limits local allows what the model can do"),
        ({"scheduler": "TCD"}, "scheduler: 'TCD' is not one of DDIM, DPM Multi, DPM Single, Euler a, Euler, Heun, DPM2 a Karras, DPM2 Karras, LMS, PNDM, DDPM, UniPC"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as failure:
            params.read({"prompt": "a", **body}, entry, "segmind", 4000)
        assert str(failure.value) == text
    body = {"prompt": "a", "num_inference_steps": 19, "img_width": 128, "img_height": 64, "scheduler": "TCD"}
    asked = params.read(body, entry, "local", 4000)
    assert (asked.options["steps"], asked.options["width"], asked.options["scheduler"]) == (19, 128, "TCD")


def test_old_names_are_taken_in_segmind_limits_too() -> None:
    for name in ("dpmpp_2m", "dmpp_2m", "dpmpp_sde_ancestral", "euler_a", "ddim"):
        params.read({"prompt": "a", "scheduler": name}, entry_of("tinysd1.5-txt2img"), "segmind", 4000)


def test_fields_that_a_page_lacks_are_ignored() -> None:
    body = {"prompt": "a", "guidance_scale": 9, "img_width": 128, "img_height": 128}
    asked = params.read(body, entry_of("segmind-vega-rt-v1"), "local", 4000)
    assert "guidance" not in asked.options


def test_a_stand_in_does_what_comes_nearest_and_says_so(server: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 100, "img_width": 1024, "img_height": 100}
    answer = server.post("/v1/segmind-vega-rt-v1", body)
    assert answer.headers["x-vega-edge-adjusted"] == "num_inference_steps=50, img_width=128, img_height=64"
    assert picture(answer.content).size == (128, 64)


ASKED_OF_VEGA = {"prompt": "a", "num_inference_steps": 25, "guidance_scale": 9, "scheduler": "UniPC", "img_width": 1024}
OF_FEW_STEPS = "scheduler=LCM, num_inference_steps=4, guidance_scale=0.0"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_stand_in_of_another_kind_draws_in_its_own_way_and_says_so(server: Running, version: str) -> None:
    answer = server.post(f"/{version}/segmind-vega", ASKED_OF_VEGA)
    assert set(answer.headers["x-vega-edge-adjusted"].split(", ")) == {*OF_FEW_STEPS.split(", "), "img_width=128"}


@pytest.mark.parametrize(
    ("slug", "model", "own"),
    [
        ("segmind-vega", "demo-vegart", True), ("segmind-vega", "demo-vega", False),
        ("segmind-vega-rt-v1", "demo-vegart", False), ("segmind-vega-rt-v1", "demo-vega", True),
        ("mine", "demo-vegart", False),
    ],
)  # fmt: skip
def test_a_stand_in_of_the_same_kind_does_as_it_is_asked(slug: str, model: str, own: bool) -> None:
    asked = params.read({"prompt": "a", "num_inference_steps": 6}, catalog({slug: model})[slug], "local", 4000)
    assert ("steps" not in asked.options) == own == bool(asked.adjusted)


@pytest.mark.parametrize(
    ("sides", "drawn"),
    [
        ((1024, 1024), (128, 128)), ((1024, None), (128, None)), ((512, 1024), (64, 128)), ((256, 200), (256, 192)),
        ((300, 1), (128, 64)), ((192, 64), (192, 64)), ((-5, 0), (64, 64)), ((10**17, 10**17), (128, 128)),
    ],
)  # fmt: skip
def test_a_stand_in_draws_large_pictures_small(sides: tuple[Any, Any], drawn: tuple[Any, Any]) -> None:
    entry = catalog({"segmind-vega": "demo-vegart"})["segmind-vega"]
    body = {
        "prompt": "a",
        **{name: side for name, side in zip(("img_width", "img_height"), sides, strict=True) if side},
    }
    body.update({"img_height": 0} if sides[1] == 0 else {})
    asked = params.read(body, entry, "local", 4000)
    assert (asked.options["width"], asked.options.get("height")) == drawn
    told = {f"{n}={d}" for n, s, d in zip(("img_width", "img_height"), sides, drawn, strict=True) if s != d}
    assert set(asked.adjusted) == told


def test_a_prompt_that_is_cut_off_is_told(tmp_path: Path) -> None:
    with running(tmp_path, real=True) as server:
        long = {"prompt": "a red star " * 40, "num_inference_steps": 1, "img_width": 64, "img_height": 64}
        told = [server.post(V1, body).headers.get("x-vega-edge-adjusted") for body in (long, {**long, "prompt": "a"})]
    assert told == ["prompt cut off after 75 tokens", None]


def test_v2_says_what_was_drawn_otherwise_and_what_was_cut_off_also_after_a_restart(tmp_path: Path) -> None:
    long = {"prompt": "a red star " * 40, "negative_prompt": "blue " * 90, "img_width": 1024, "img_height": 64}
    sides = {"img_width": 64, "img_height": 64}
    told = {"img_width=128", *OF_FEW_STEPS.split(", "), "prompt cut off after 75 tokens"}
    with running(tmp_path, real=True) as server:
        asked = {**long, "guidance_scale": 9, "num_inference_steps": 25, "scheduler": "UniPC"}
        job, other = (
            server.post(path, body).json()["request_id"]
            for path, body in (("/v2/segmind-vega", asked), ("/v2/demo-vegart", {"prompt": "a", **sides}))
        )
        for _ in range(2):
            answer = server.ended(f"/v2/requests/{job}/status")
            assert set(answer.json()["adjusted"]) >= told, answer.text
        assert "adjusted" not in server.ended(f"/v2/requests/{other}/status").json()
    with running(tmp_path) as server:
        for path in (f"/v2/requests/{job}", f"/v2/requests/{job}/status", f"/v1/requests/{job}"):
            answer = server.http.get(path)
            assert set(answer.headers["x-vega-edge-adjusted"].split(", ")) == set(answer.json()["adjusted"]) >= told
            assert set(answer.json()["metrics"]) == METRICS
        answer = server.http.get(f"/v2/requests/{other}")
        assert "adjusted" not in answer.json() and "x-vega-edge-adjusted" not in answer.headers


def test_aliases_that_are_wrong() -> None:
    with pytest.raises(UsageError, match="unknown model 'nope'"):
        catalog({"segmind-vega": "nope"})
    with pytest.raises(UsageError) as failure:
        catalog({"a/b": "demo-vegart"})
    assert str(failure.value) == "--alias must be SLUG=MODEL, and a slug has no slash, got 'a/b'"


METRICS = {"inference_time", "queue_time", "total_time", "cost", "remaining_credits"}


def test_the_sdk_base_url_without_v1(server: Running) -> None:
    assert server.post("/demo-vegart").status_code == 200
    assert server.post("/v1/models/demo-vegart").status_code == 200
    assert httpx.get(f"{server.url}/v1/get-user-credits").json()["credits"] > 0
