"""The clients that people have: Segmind's SDK, and the code on the API pages with only address and key changed."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
pytest.importorskip("segmind", reason="Segmind's SDK is not installed: pip install segmind==1.3.0")

from segmind import InferenceFailed, InferenceTimeout, SegmindClient, SegmindError

from vega_edge.errors import EngineError
from vega_edge.models import recipes
from vega_edge.runtime.request import Limits
from vega_edge.serve import keys
from vega_edge.serve.catalog import api_pages

from .serve_fakes import FakeDrawer, Gate
from .serve_running import ALIASES, Running, running

SNIPPETS = Path(__file__).with_name("snippets")
ENVIRONMENT = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def before(request: Any, index: int) -> None:
        if request.prompt == "fail":
            raise EngineError("the engine failed")

    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = keys.add(file, "sdk")
    with running(tmp_path_factory.mktemp("serve"), FakeDrawer(before_step=before), api_keys=file) as server:
        server.http.headers["x-api-key"] = key
        yield server


@pytest.fixture(scope="module")
def own_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The models themselves, not others under their names: what is asked for must be right without being adjusted."""
    home = tmp_path_factory.mktemp("home")
    for name, recipe in recipes().items():
        if recipe.api_slugs[0] in ALIASES:
            (home / "bundles" / name).mkdir(parents=True)  # which is all that the server looks at
    drawer = FakeDrawer(limits=Limits(steps=(1, 100), size_px=(64, 1024)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VEGA_EDGE_HOME", str(home))
        file = home / "keys.json"
        key = keys.add(file, "sdk")
        with running(home / "serve", drawer, aliases={}, limits="segmind", api_keys=file) as server:
            server.http.headers["x-api-key"] = key
            yield server


@pytest.fixture(params=["server", "own_pages"])
def either(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("slug", ALIASES)
def test_sdk_and_a_pages_own_example(own_pages: Running, monkeypatch: pytest.MonkeyPatch, slug: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = SegmindClient(api_key=own_pages.http.headers["x-api-key"], base_url=f"{own_pages.url}/v1")
    example = {**api_pages()[slug]["example"], "prompt": "a star"}
    answer = client.run_sync(slug, **example)
    assert is_jpeg(answer.content) and "x-vega-edge-adjusted" not in answer.headers
    size = json.loads(answer.headers["x-output-metadata"])
    assert size == {"height": example["img_height"], "width": example["img_width"]}
    assert client.run(slug, prompt="a star")["status"] == "COMPLETED"


@pytest.fixture
def client(server: Running, monkeypatch: pytest.MonkeyPatch) -> SegmindClient:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return SegmindClient(api_key=server.http.headers["x-api-key"], base_url=f"{server.url}/v1")


def is_jpeg(data: bytes) -> bool:
    return Image.open(io.BytesIO(data)).format == "JPEG"


def test_sdk_run(server: Running, client: SegmindClient) -> None:
    result = client.run("segmind-vega", prompt="a star", seed=1232788698, samples=2)
    assert (result["status"], result["seed"]) == ("COMPLETED", "1232788698")
    assert result["metrics"]["inference_time"] >= 0
    assert is_jpeg(server.http.get(result["output"]).content)


def test_sdk_run_sync(client: SegmindClient) -> None:
    answer = client.run_sync("segmind-vega-rt-v1", prompt="a star")
    assert is_jpeg(answer.content) and answer.headers["x-remaining-credits"]
    assert "image" in client.run_sync("segmind-vega-rt-v1", prompt="a star", base64=True).json()


def test_sdk_submit_and_wait(client: SegmindClient) -> None:
    job = client.submit_async("segmind-vega", prompt="a star")
    assert len(job.request_id) == 32
    assert job.wait(timeout=60, interval=0.1)["status"] == "COMPLETED"
    assert job.status()["status"] == "COMPLETED"


def test_sdk_failures(client: SegmindClient) -> None:
    with pytest.raises(InferenceFailed) as failed:
        client.run("segmind-vega", prompt="fail")
    assert failed.value.detail == "the engine failed"
    with pytest.raises(InferenceFailed) as wrong:
        client.run("segmind-vega", prompt="a star", seed="many")
    assert wrong.value.detail == "seed: must be a number, got 'many'"
    for slug, options, status, detail in (
        ("no-such-model", {"prompt": "a"}, 404, "unknown model 'no-such-model'"),
        ("segmind-vega", {}, 400, "prompt: must be text, got nothing"),
        ("segmind-vega", {"prompt": "fail"}, 500, "the engine failed"),
    ):
        with pytest.raises(SegmindError) as error:
            client.run_sync(slug, **options)
        assert error.value.status == status and error.value.detail.startswith(detail)
    client._client.headers["x-api-key"] = "SG_wrong"
    with pytest.raises(SegmindError) as error:
        client.run("segmind-vega", prompt="a")
    assert error.value.status == 401 and error.value.detail.startswith("Unauthorized. API key is invalid")


def test_sdk_timeout_and_the_job_that_goes_on(tmp_path: Path) -> None:
    """The SDK looks at its clock between a poll and its sleep, so a poll that is held makes it late by the hold."""
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        client = SegmindClient(base_url=f"{server.url}/v1")
        job = client.submit_async("segmind-vega", prompt="a star")
        with pytest.raises(InferenceTimeout) as timeout:
            job.wait(timeout=0.3)
        assert timeout.value.request_id == job.request_id
        assert timeout.value.elapsed_s < 3.5  # 0.3 and the hold of 1 s, with room for a busy machine
        gate.let(100)
        assert job.wait(timeout=60, interval=0.1)["status"] == "COMPLETED"


def test_sdk_with_a_longer_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/serve.md shows it: one poll waits for a job that takes longer than the second of an ordinary one."""
    gate, slept = Gate(), []
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        job = SegmindClient(base_url=f"{server.url}/v1").submit_async("segmind-vega", prompt="a star")
        job.status_url += "?hold=20"
        threading.Timer(1.5, gate.let, (100,)).start()
        with monkeypatch.context() as patch:  # of every thread, so only while no server is started or stopped
            patch.setattr("segmind.v2.time.sleep", slept.append)
            assert job.wait()["status"] == "COMPLETED"
    assert slept == []


def test_the_clients_sleep_between_polls_is_not_paid(client: SegmindClient, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("segmind.v2.time.sleep", slept.append)
    for _ in range(5):
        client.run("segmind-vega", prompt="a star")
    assert slept == []


def snippet(server: Running, name: str, **changes: str) -> str:
    text = (SNIPPETS / f"{name}.txt").read_text(encoding="utf-8").replace("https://api.segmind.com", server.url)
    for old in ("YOUR API-KEY", "YOUR_API_KEY"):
        text = text.replace(old, server.http.headers["x-api-key"])
    for old, new in changes.items():
        text = text.replace(CHANGES[old], new)
    return text


CHANGES = {"base64": '"base64": false', "answer": "result = response.json()", "shown": "json.dumps(result, indent=2)", "log": "console.log(response.data)"}  # fmt: skip


def run(command: list[str]) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output.decode("utf-8", "replace")


def test_the_page_of_vega_through_the_sdks_default_client(either: Running) -> None:
    before = f"import segmind\nsegmind._default_client = segmind.SegmindClient(api_key={either.http.headers['x-api-key']!r}, base_url={either.url + '/v1'!r})\n"
    manual = "client = SegmindClient()"
    text = snippet(either, "001.py")
    assert text.count(manual) == 1
    text = text.replace(manual, "client = segmind._default_client")
    lines = run([sys.executable, "-c", before + text]).splitlines()
    assert lines[0] == "COMPLETED" and lines[1].startswith(f"{either.url}/generations/")
    assert float(lines[2]) >= 0 and len(lines[3]) == 32


@pytest.mark.parametrize("name", ["002.py", "004.py"])
def test_the_pages_with_requests(either: Running, name: str) -> None:
    pytest.importorskip("requests")
    printed = json.loads(run([sys.executable, "-c", snippet(either, name, base64='"base64": True')]))
    assert printed["status"] == "Success" and printed["image"].startswith("/9j/")
    reading = snippet(either, name, base64='"base64": False', answer="result = response.content", shown="result[:3]")
    assert run([sys.executable, "-c", reading]).strip() == "b'\\xff\\xd8\\xff'"


@pytest.mark.parametrize("name", ["000.js", "003-repaired.js"])
def test_the_pages_with_axios(either: Running, name: str) -> None:
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require('axios')"], capture_output=True).returncode:
        pytest.skip("node with axios is not installed: npm install axios, and NODE_PATH where it is")
    assert "JFIF" in run([node, "-e", snippet(either, name)])
    measured = snippet(either, name, log="console.log(response.status, response.headers['x-seed-value'])")
    assert run([node, "-e", measured]).split() == ["200", "758143278" if name == "000.js" else "2313248373"]
