"""A database of jobs that is damaged in its content: the server starts, and what can be read goes on."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.serve.record import COMPLETED, FAILED, PROCESSING, QUEUED
from vega_edge.serve.store import Store

from .serve_running import Running, running, wait_until
from .test_serve_restart import record, submitted

BAD, GOOD = "b" * 32, "a" * 32


def prepared(folder: Path, *statements: tuple[str, Any], status: str = QUEUED) -> None:
    """A queue of two, of which the first is changed by SQL where its id is BAD."""
    store = Store(folder)
    store.open()
    for name in (BAD, GOOD):
        store.add(record(name, files=(f"{name}.jpeg",)))
    if status != QUEUED:
        store.begin(BAD)
    if status == COMPLETED:
        store.complete(BAD, {})
    store.close()
    change(folder, *((f"UPDATE jobs SET {text} WHERE id = '{BAD}'", value) for text, value in statements))


def change(folder: Path, *statements: tuple[str, Any]) -> None:
    connection = sqlite3.connect(folder / "jobs.sqlite")
    for text, value in statements:
        connection.execute(text, () if value is None else (value,))
    connection.commit()
    connection.close()


def ended(server: Running, job: str) -> Any:
    return server.ended(f"/v2/requests/{job}/status").json()


@pytest.mark.parametrize("status", [QUEUED, PROCESSING, COMPLETED])
@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("options", "{half", "options are not JSON"),
        ("options", "[" * 100_000, "options are not JSON"),
        ("options", "[1]", "options are of another kind"),
        ("options", "{}", "options have no seed"),
        ("files", "x", "files are not JSON"),
        ("files", "[]", "files are not the job's pictures"),
        ("files", "[1]", "files are not the job's pictures"),
        ("files", '["../a.jpeg"]', "files are not the job's pictures"),
        ("files", '["a.jpeg", "../a.jpeg"]', "files are not the job's pictures"),  # as many good ones as samples
        ("files", '"a"', "files are of another kind"),
        ("metrics", "7", "metrics are of another kind"),
        ("metrics", '{"total_time": NaN}', "metrics are not JSON"),
        ("metrics", '{"total_time": 1e999}', "metrics are not JSON"),
        ("metrics", '{"adjusted": 7}', "metrics say of adjusted what can't be told"),
        ("metrics", '{"adjusted": ["a\\r\\nb: c"]}', "metrics say of adjusted what can't be told"),
        ("error", b"full", "error is b'full'"),
        ("attempts", "often", "attempts is 'often'"),
        ("prompt", b"\xff\0", "prompt is b'\\xff\\x00'"),
        ("created", "now", "created is 'now'"),
    ],
)
def test_a_job_that_can_not_be_read_fails_alone(tmp_path: Path, column: str, value: Any, why: str, status: str) -> None:
    prepared(tmp_path, (f"{column} = ?", value), status=status)
    store = Store(tmp_path)
    store.open()
    assert [r.id for r in store.recover()] == [GOOD]
    found = store.get(BAD)
    assert found is not None
    assert (found.status, found.error) == (FAILED, f"what the disk has of this job is damaged: {why}")
    assert store.expire(0.0) == 0
    store.close()


@pytest.mark.parametrize("change", [("options = ?", "{half"), ("files = ?", "[]"), ("options = ?", "[1]")])
def test_the_server_starts_and_says_what_became_of_it(tmp_path: Path, change: tuple[str, Any]) -> None:
    prepared(tmp_path, change)
    with running(tmp_path) as server:
        assert ended(server, GOOD)["status"] == COMPLETED
        answer = server.http.get(f"/v2/requests/{BAD}")
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("what the disk has of this job is damaged: ")
        assert server.http.get("/readyz").status_code == 200 and submitted(server) == COMPLETED


def test_a_finished_job_whose_pictures_are_lost_from_the_database_is_no_500(tmp_path: Path) -> None:
    prepared(tmp_path, ("files = ?", "[]"), status=COMPLETED)
    with running(tmp_path) as server:
        answer = server.http.get(f"/v2/requests/{BAD}")
        assert (answer.status_code, answer.json()["status"]) == (422, FAILED)


def test_a_text_that_is_no_utf_8_keeps_no_other_from_being_read(tmp_path: Path) -> None:
    prepared(tmp_path, ("model = CAST(? AS TEXT)", b"\xff\xfe"))
    with running(tmp_path) as server:
        assert ended(server, GOOD)["status"] == COMPLETED
        assert ended(server, BAD)["error"] == "there is no model \ufffd\ufffd any more"


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE jobs DROP COLUMN prompt",
        "DROP TABLE jobs",
        "ALTER TABLE jobs RENAME TO work",
        "PRAGMA user_version=0",
    ],
)
def test_a_database_without_its_table_is_set_aside(
    tmp_path: Path, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(tmp_path)
    change(tmp_path, (statement, None))
    with running(tmp_path) as server:
        wait_until(lambda: server.http.get("/readyz").status_code == 200, 5)
        assert submitted(server) == COMPLETED
    (aside,) = tmp_path.glob("jobs-damaged-*.sqlite")
    assert f"the database of jobs was damaged; it is kept as {aside}, a new one is begun" in caplog.text


def test_an_unreadable_row_is_forgotten_in_time(tmp_path: Path) -> None:
    prepared(tmp_path, ("files = ?", "x"))
    store = Store(tmp_path)
    store.open()
    store.recover()
    assert store.expire(time.time() + 3600) == 1 and store.get(BAD) is None
    store.close()
