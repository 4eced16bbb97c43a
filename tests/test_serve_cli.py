"""`vega-edge serve` from the command line, and the embedded model through the whole of it."""

from __future__ import annotations

import argparse
import io
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge import Pipeline
from vega_edge.bench.serve import verdict
from vega_edge.cli import main
from vega_edge.errors import VegaEdgeError
from vega_edge.models import find_bundle
from vega_edge.runtime.memory import weight_bytes
from vega_edge.serve import keys
from vega_edge.serve.job import Done
from vega_edge.serve.listener import addresses, listen
from vega_edge.serve.live import NEWCOMERS
from vega_edge.serve.protocols import HEAD_S
from vega_edge.serve.service import Service, build
from vega_edge.serve.settings import _RANGES, BODY_BYTES, BODY_S, Settings
from vega_edge.verbs import serve

from . import serve_fakes
from .serve_fakes import FakeDrawer
from .serve_running import free_port, running, wait_until


def test_keys_add_list_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    assert main(["serve", "keys", "add", "kiosk", "--api-keys", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch("SG_[0-9a-f]{32}", key) and keys.KeyFile(file).owner(key) == "kiosk"
    if sys.platform != "win32":
        assert file.stat().st_mode & 0o077 == 0
    assert main(["serve", "keys", "list", "--api-keys", str(file)]) == 0
    assert re.fullmatch(r"kiosk  \d{4}-\d\d-\d\dT[\d:]{8}Z\n", capsys.readouterr().out)
    assert main(["serve", "keys", "revoke", "kiosk", "--api-keys", str(file)]) == 0
    assert keys.load(file) == []


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--host", "0.0.0.0"], 2, "others can reach 0.0.0.0; give --api-keys FILE (make one: vega-edge serve keys add NAME --api-keys FILE), or say --no-auth"),
        (["--alias", "x"], 2, "--alias must be SLUG=MODEL, such as segmind-vega=demo-vegart, got 'x'"),
        (["--api-keys", "nowhere.json"], 1, "nowhere.json does not exist; make it: vega-edge serve keys add NAME --api-keys nowhere.json"),
        (["--lora", "x.safetensors"], 2, "--lora must be MODEL=FILE or MODEL=FILE:STRENGTH, such as segmind-vega=style.safetensors:0.8, got 'x.safetensors'"),
        (["--lora", "demo-vega=x:much"], 2, "--lora demo-vega: must be FILE or FILE:STRENGTH, such as style.safetensors:0.8, got 'x:much'"),
        (["--lora", "x=y.safetensors"], 2, "--lora: unknown model 'x'; there are: demo-small-sd, demo-tiny-sd, demo-vega"),
        (["--lora", "demo-vegart=y.safetensors"], 2, "--lora: y.safetensors is not a file"),
        (["--preload", "x"], 2, "--preload: unknown model 'x'; there are: demo-small-sd, demo-tiny-sd, demo-vega"),
        (["--device", "gpu"], 2, "device must be cpu, cuda or cuda:N, such as cuda:0, not 'gpu'"),
        (["--engine", "onnxruntime-cpu", "--device", "cuda:0"], 2, "engine onnxruntime-cpu: it runs on the CPU, not on cuda:0; leave --device out, or choose another engine"),
        (["--engine", "onnxruntime"], 2, "unknown engine 'onnxruntime'; did you mean "),
        (["--memory", "little"], 2, "unknown memory 'little'; there are: low, normal"),
        (["--vae", "small"], 2, "unknown vae 'small'; there are: full, tiny"),
        (["--memory-budget", "much"], 2, "argument --memory-budget: must be a size such as 6G or 800M, got 'much'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(
    arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["serve", *arguments]) == status
    except SystemExit as exit:
        assert exit.code == status
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


def test_flags_settings_and_their_page_have_the_same_defaults() -> None:
    parser = argparse.ArgumentParser()
    serve.add(parser)
    made = serve._settings(parser.parse_args([]))
    assert made == Settings(made.data)
    page = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")
    written = {flag: float(number) for flag, number in re.findall(r"`(--[\w-]+)`, (\d+)", page)}
    assert len(written) == 7
    assert written == {flag: getattr(made, name) for name, (flag, _, _) in _RANGES.items() if flag in written}
    assert f"| {BODY_BYTES // 1024} KiB, within {BODY_S:g} s |" in page and f"| {made.connections} |" in page
    assert f", and {NEWCOMERS} that have not shown their key yet" in page and f"| within {HEAD_S:g} s |" in page


def test_engine_device_memory_and_decoder_reach_the_pipeline_that_the_worker_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    class Pipelines:
        @staticmethod
        def open(*arguments: Any, **options: Any) -> FakeDrawer:
            opened.append((arguments, options))
            return FakeDrawer()

    class OnceDrawn:
        """Draws one picture in place of serving."""

        def __init__(self, service: Service) -> None:
            self.service = service

        def run(self, sockets: Any) -> None:
            self.service.worker.start()
            job = serve_fakes.job()
            self.service.worker.submit(job)
            assert isinstance(job.listener, serve_fakes.Heard) and isinstance(job.listener.end(), Done)
            self.service.worker.stop(0)
            assert self.service.worker.join(serve_fakes.WAIT_S)

    monkeypatch.setattr("vega_edge.serve.service.Pipeline", Pipelines)
    monkeypatch.setattr("vega_edge.serve.listener.Server", OnceDrawn)
    common = ["serve", "--port", str(free_port()), "--data", str(tmp_path)]
    assert main(common) == 0
    assert main([*common, "--device", "cuda:1", "--memory", "low", "--vae", "tiny"]) == 0
    first, second, other = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "other"))
    for file in (first, second, other):
        file.touch()
    texts = f"demo-vegart={first}:0.5", f"demo-vegart={second}", f"demo-vega={other}"
    assert main([*common, *(word for text in texts for word in ("--lora", text))]) == 0
    assert opened == [
        (("demo-vegart", "auto"), {"device": None, "memory": "normal", "vae": "full", "loras": ()}),
        (("demo-vegart", "auto"), {"device": "cuda:1", "memory": "low", "vae": "tiny", "loras": ()}),
        (("demo-vegart", "auto"), {"device": None, "memory": "normal", "vae": "full", "loras": [(first, 0.5), (second, 1)]}),
    ]  # fmt: skip


def test_the_memory_budget_counts_one_network_where_one_is_open(tmp_path: Path) -> None:
    sizes = weight_bytes(find_bundle("demo-vegart"))
    biggest, all_of_them = max(sizes.values()), sum(sizes.values())
    for memory, needed in (("normal", all_of_them), ("low", biggest)):
        for budget, fits in ((needed, True), (needed - 1, False)):
            settings = Settings(tmp_path, memory=memory, memory_budget=budget)
            assert build(settings, lambda name: FakeDrawer()).residents.fits_beside("demo-vegart", []) is fits


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "a") as server:
        port = server.service.settings.port
        assert main(["serve", "--port", str(port), "--data", str(tmp_path / "b")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"vega-edge: can't listen on 127.0.0.1:{port} (") and err.count("\n") == 1


def test_the_benchmark_says_what_is_missed() -> None:
    good = verdict({16: 0.9}, {64: [{"statuses": {200: 5, 429: 9}}]}, {"growth": 0.03})
    assert [row["ok"] for row in good.values()] == [True] * 3
    bad = verdict({16: 0.89}, {64: [{"statuses": {200: 5, 0: 1}}]}, {"growth": 0.031})
    assert [row["ok"] for row in bad.values()] == [False] * 3
    assert bad["statuses at 64 clients other than 200 and 429"]["measured"] == {"0": 1}
    assert len(verdict({16: 1.0}, {64: []}, None)) == 2


@pytest.mark.parametrize(
    ("host", "names"),
    [("127.0.0.1", ["localhost"]), ("localhost", ["localhost"]), ("::1", ["localhost"]),
     ("0.0.0.0", ["localhost", socket.gethostname()]), ("::", ["localhost", socket.gethostname()])],
)  # fmt: skip
def test_the_addresses_that_are_printed_can_be_called(host: str, names: list[str]) -> None:
    try:
        listening = listen(host, 0)
    except VegaEdgeError:
        pytest.skip("this machine has no IPv6")
    with listening:
        port = listening.getsockname()[1]
        assert addresses(listening, host) == [f"http://{name}:{port}/" for name in names]
        assert addresses(listening, "fe80::2") == [f"http://[fe80::2]:{port}/"]
        for address in ["127.0.0.1"] * (host != "::1") + ["::1"] * (host in ("::", "::1")):
            socket.create_connection((address, port), timeout=5).close()


def test_the_server_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    pipe = Pipeline.open("demo-vegart")
    ours = pipe("a big red star on a blue background", seed=7, width=64, height=64).images[0]
    pipe.close()
    with running(tmp_path, real=True) as server:
        body = {"prompt": "a big red star on a blue background", "seed": 7, "img_width": 64, "img_height": 64}
        theirs = Image.open(io.BytesIO(server.post("/v1/demo-vegart", body).content)).convert("RGB")
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 4  # JPEG


def test_prompts_are_not_logged(tmp_path: Path) -> None:
    """By nobody: the tokenizer, which says what it cuts off, is far from the server."""
    port = free_port()
    command = [sys.executable, "-m", "vega_edge", "serve", "--port", str(port), "--data", str(tmp_path / "data")]
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
                wait_until(lambda: is_up(http))
                body = {"prompt": "a red star, " * 30 + "a wish", "negative_prompt": "a fear " * 80, "seed": 4}
                for changes in ({}, {"guidance_scale": 2}, {"num_inference_steps": "x"}):
                    http.post("/v1/demo-vegart", json={**body, **changes})
        finally:
            process.terminate()
            process.wait(30)
        said.seek(0)
        text = said.read()
    assert text.count('"path": "/v1/demo-vegart"') == 3
    assert not {word for word in ("star", "wish", "fear") if word in text}


def is_up(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
