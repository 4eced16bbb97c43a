"""`vega-edge serve` from the command line, and the embedded model through the whole of it."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge import Pipeline
from vega_edge.cli import main
from vega_edge.serve import keys

from .serve_running import running


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
        (["--preload", "x"], 2, "--preload: unknown model 'x'; there are: demo-vega"),
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


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "a") as server:
        port = server.service.settings.port
        assert main(["serve", "--port", str(port), "--data", str(tmp_path / "b")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"vega-edge: can't listen on 127.0.0.1:{port} (") and err.count("\n") == 1


def test_the_server_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    pipe = Pipeline.open("demo-vegart")
    ours = pipe("a big red star on a blue background", seed=7, width=64, height=64).images[0]
    pipe.close()
    with running(tmp_path, real=True) as server:
        body = {"prompt": "a big red star on a blue background", "seed": 7, "img_width": 64, "img_height": 64}
        theirs = Image.open(io.BytesIO(server.post("/v1/demo-vegart", body).content)).convert("RGB")
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 4  # JPEG
