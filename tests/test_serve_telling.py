"""What clients are told of trouble: why, when to come again, never where things lie on the server's machine."""

from __future__ import annotations

import calendar
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import BundleError, UsageError
from vega_edge.serve import keys
from vega_edge.serve.store import Store, StoreError
from vega_edge.serve.telling import not_now, told

from .serve_fakes import FakeDrawer
from .serve_running import Running, running, wait_until
from .test_serve_live import live, send, until


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("/srv/jobs.sqlite can't be used", "jobs.sqlite can't be used"),
        ("/srv/my pictures/a b.onnx is not /srv/b.onnx", "a b.onnx is not b.onnx"),
        (r"C:\Users\me\jobs.sqlite can't be used", "jobs.sqlite can't be used"),
        ("unet of '/srv/bundles/x' and/or \"/srv/y\"; see http://name/a/b", "unet of 'x' and/or \"y\"; see http://name/a/b"),
        ("5 / 3 and 16/9", "5 / 3 and 16/9"),
    ],
)  # fmt: skip
def test_paths_become_their_last_part(text: str, without: str) -> None:
    assert told(BundleError(text)) == without
    assert told(UsageError(text)) == text


def test_when_to_come_again() -> None:
    before = time.time()
    headers = not_now(29.2)
    again = calendar.timegm(time.strptime(headers["x-rate-limit-reset-at-utc"], "%Y-%m-%dT%H:%M:%SZ"))
    assert headers["retry-after"] == "30" and 29 <= again - before <= 32


def test_every_429_says_when_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    headers = {"x-api-key": keys.add(file, "me")}

    def full(self: Store, record: Any) -> None:
        raise StoreError("the disk is full")

    with running(tmp_path / "data", api_keys=file, rate=2) as server:
        monkeypatch.setattr(Store, "add", full)
        answers = [server.post(f"/v{version}/demo-vegart", headers=headers) for version in (2, 1, 1)]
    assert [a.status_code for a in answers] == [429, 200, 429]
    assert ["x-rate-limit-reset-at-utc" in a.headers for a in answers] == [True, False, True]


FAULT = "bundle /srv/secret place/demo is damaged: unet/model.onnx"
TOLD = "bundle demo is damaged: unet/model.onnx"


@pytest.fixture
def faulty(tmp_path: Path) -> Any:
    def before(request: Any, index: int) -> None:
        raise BundleError(FAULT)

    with running(tmp_path, FakeDrawer(before_step=before)) as server:
        yield server


def test_an_engine_that_names_its_files(faulty: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vega_edge.serve"):
        first = faulty.post("/v1/demo-vegart")
        assert (first.status_code, first.json()) == (500, {"error": TOLD})
        job = faulty.post("/v2/demo-vegart").json()
        assert faulty.ended(job["status_url"]).json()["error"] == TOLD
        with live(faulty) as page:
            send(page, type="draw", id=1, prompt="a star")
            assert until(page, "error")["error"] == TOLD
        wait_until(lambda: caplog.text.count("/srv/secret place/demo") >= 3)  # v1's own line comes after its answer
    assert f"job {job['request_id']} failed: {FAULT}" in caplog.text


def test_readyz_is_open_to_all_and_names_no_folder(tmp_path: Path) -> None:
    holder = Store(tmp_path / "data")
    holder.open()
    file = tmp_path / "keys.json"
    keys.add(file, "me")
    with running(tmp_path / "data", api_keys=file) as server:
        server.service.worker.failure = f"demo-vega could not be preloaded: {FAULT}"
        file.unlink()
        time.sleep(1.1)
        why = server.http.get("/readyz").json()["why"]
        assert len(why) == 3 and str(tmp_path) not in str(why) and "/srv" not in str(why)
        assert why[1].startswith("keys.json does not exist; ") and "data is in use by another server" in why[2]
        holder.close()
        server.service.queue.failure = None
