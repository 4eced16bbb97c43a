"""What is kept for a while only: jobs that were FAILED as they came, and pictures whose time ends as they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")
from vega_edge.serve import refused
from vega_edge.serve.record import FAILED
from vega_edge.serve.refused import Refused

from .serve_running import running
from .test_serve_restart import record

WRONG = {"prompt": 1}


def test_wrong_parameters_fill_neither_the_disk_nor_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "MOST", 20)
    with running(tmp_path) as server:
        good = server.post("/v2/demo-vegart").json()
        assert server.ended(good["status_url"]).json()["status"] == "COMPLETED"
        seen: list[str] = []
        server.service.queue._store._required().set_trace_callback(seen.append)
        answers = [server.post("/v2/demo-vegart", WRONG) for _ in range(50)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["status"] for answer in answers} == {"QUEUED"}  # as the API says it
        assert not seen and len(server.service.queue._refused) == 20
        assert [server.ended(answer.json()["status_url"]).status_code for answer in answers] == [404] * 30 + [422] * 20
        assert server.http.get(good["response_url"]).status_code == 200


def test_one_client_takes_no_room_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "MOST", 10)
    kept = Refused(3600)
    for index in range(30):
        who = "modest" if index % 10 == 0 else "greedy"
        kept.add(replace(record(f"{index:032}"), client=who, status=FAILED))
    assert len(kept) == 10
    assert [index for index in range(30) if kept.get(f"{index:032}")] == [0, 10, 20, *range(23, 30)]


def test_a_refused_job_is_forgotten_in_its_time() -> None:
    kept = Refused(60)
    for name, age in (("old", 61), ("new", 59)):
        fresh = record(name)
        kept.add(replace(fresh, created=fresh.created - age))
    assert kept.get("old") is None and kept.get("new") is not None and len(kept) == 1


@pytest.mark.parametrize("base64", [False, True])
def test_a_picture_that_ends_as_it_is_asked_for_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base64: bool
) -> None:
    """Between a look and the reading, as the housekeeping may do it."""
    with running(tmp_path) as server:
        job = server.post("/v2/demo-vegart", {"prompt": "a", "base64": base64}).json()
        assert server.ended(job["status_url"]).json()["status"] == "COMPLETED"
        url = server.http.get(job["response_url"]).json()["output"]
        (file,) = (tmp_path / "generations").iterdir()
        monkeypatch.setattr(Path, "is_file", lambda self: True)
        file.unlink()
        for verb in ("GET", "HEAD"):
            assert server.http.request(verb, url).status_code == 404
        assert server.http.get(url).json() == {"error": f"'{file.name}' not found"}
        for path in (job["response_url"], job["poll_url"]):
            answer = server.http.get(path)
            assert (answer.status_code, answer.json()) == (404, {"error": f"Request {job['request_id']} not found"})


def test_a_picture_is_read_whole_before_its_first_byte_is_sent(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        job = server.post("/v2/demo-vegart").json()
        server.ended(job["status_url"])
        url = server.http.get(job["response_url"]).json()["output"]
        (file,) = (tmp_path / "generations").iterdir()
        head, got = server.http.head(url), server.http.get(url)
        assert got.content == file.read_bytes() and head.content == b""
        for answer in (head, got):
            assert answer.headers["content-length"] == str(len(got.content))
            assert answer.headers["cache-control"] == "private, max-age=3600, immutable"
