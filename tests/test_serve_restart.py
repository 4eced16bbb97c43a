"""Jobs outlive the process: killed in the middle of ten, stopped in the middle of ten, damaged, locked, full."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.serve.record import COMPLETED, FAILED, QUEUED, Record
from vega_edge.serve.store import Store, StoreError, Taken

from .serve_fakes import FakeDrawer
from .serve_running import Running, free_port, running, wait_until


class Process:
    def __init__(self, folder: Path) -> None:
        self.port, self.log = free_port(), folder / "drawn.txt"
        self.log.touch()
        self._arguments = [
            sys.executable,
            "-m",
            "tests.serve_running",
            str(self.port),
            str(folder / "data"),
            str(self.log),
        ]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def start(self, until: str = "/readyz") -> None:
        root = Path(__file__).parent.parent
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(self._arguments, cwd=root, env={**os.environ, "PYTHONPATH": paths})
        wait_until(lambda: self.answers(until))

    def answers(self, path: str) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return self.http.get(path).status_code == 200
        return False

    def submit(self, prompt: str) -> str:
        answer = self.http.post("/v2/demo-vegart", json={"prompt": prompt, "num_inference_steps": 3})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def wait(self, job: str) -> httpx.Response:
        end = time.monotonic() + 60
        while True:
            answer = self.http.get(f"/v2/requests/{job}/status?hold=20")
            if answer.json()["status"] in ("COMPLETED", "FAILED"):
                return answer
            assert time.monotonic() < end

    @property
    def drawn(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    process.start()
    yield process
    process.process.kill()
    process.process.wait()


def kill(process: Process) -> None:
    process.process.kill()
    process.process.wait()


def test_killed_in_the_middle_of_ten_jobs_all_complete_once(process: Process) -> None:
    jobs = {f"p{i}": process.submit(f"p{i}") for i in range(10)}
    wait_until(lambda: len(process.drawn) >= 4)
    kill(process)
    before = process.drawn
    process.start()
    answers = {prompt: process.wait(job) for prompt, job in jobs.items()}
    assert {prompt: answer.json()["status"] for prompt, answer in answers.items()} == dict.fromkeys(jobs, COMPLETED)
    again = [prompt for prompt in set(process.drawn) if process.drawn.count(prompt) > 1]
    assert sorted(set(process.drawn)) == sorted(jobs)
    # Only what was under way at that moment may have been drawn again, and then its first picture was never handed out.
    assert set(again) <= {before[-1]}
    for prompt, job in jobs.items():
        result = process.http.get(f"/v2/requests/{job}").json()
        assert result["prompt"] == prompt
        assert process.http.get(result["output"]).headers["content-type"] == "image/jpeg"


def test_a_job_that_takes_the_process_down_twice_has_failed(process: Process) -> None:
    job = process.submit("poison")
    for _ in range(2):
        wait_until(lambda: process.http.get(f"/v1/requests/{job}").json()["status"] == "PROCESSING")
        kill(process)
        process.start()
    answer = process.wait(job)
    assert answer.status_code == 422
    assert answer.json()["error"] == "the server ended 2 times while it drew this"
    metrics = answer.json()["metrics"]
    assert metrics.pop("total_time") > 0
    assert metrics == {"inference_time": 0.0, "queue_time": 0.0, "retry_count": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_polite_stop_finishes_the_running_picture_and_keeps_the_rest(process: Process) -> None:
    jobs = {f"p{i}": process.submit(f"p{i}") for i in range(6)}
    wait_until(lambda: len(process.drawn) >= 1)
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(30) in (0, -signal.SIGTERM)
    before = process.drawn
    assert len(before) < 6
    process.start()
    for job in jobs.values():
        assert process.wait(job).json()["status"] == COMPLETED
    assert sorted(process.drawn) == sorted(jobs)
    assert process.drawn[: len(before)] == before


def record(job: str, status: str = QUEUED, files: tuple[str, ...] = ("f.jpeg",)) -> Record:
    options = {"seed": 1, "samples": len(files)}
    return Record(job, status, 0, "me", "demo-vegart", "a star", options, False, files, None, {}, time.time())


def test_pictures_that_are_all_there_are_not_drawn_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    for name in ("done", "half"):
        store.add(record(name, files=(f"{name}-1.jpeg", f"{name}-2.jpeg")))
        store.begin(name)
        store.save(f"{name}-1.jpeg", b"jpeg")
    store.save("done-2.jpeg", b"jpeg")
    store.close()
    again = Store(tmp_path)
    again.open()
    assert [r.id for r in again.recover()] == ["half"]
    done = again.get("done")
    assert done is not None and done.status == COMPLETED
    again.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_new_folder_of_jobs_is_its_owners_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.open()
    assert store.folder.stat().st_mode & 0o077 == 0
    store.close()


def test_what_the_database_promises(tmp_path: Path) -> None:
    """A write-ahead log, and on the disk before a call returns: also when the power fails."""
    store = Store(tmp_path)
    store.open()
    answers = [store._read(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous", "locking_mode")]
    assert answers == ["wal", 2, "normal"]  # 2: FULL; normal: others may read
    store.close()


def test_jobs_come_back_in_their_order_and_a_stop_is_no_attempt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    names = [f"{n:x}" * 32 for n in (5, 3, 9, 1)]
    for name in names:
        store.add(record(name, files=(f"{name}.jpeg",)))
    for _ in range(3):
        store.begin(names[2])
        store.put_back(names[2])
    store.put_back(names[0])  # it had not begun
    assert [(r.id, r.attempts) for r in store.recover()] == [(name, 0) for name in names]
    store.begin(names[1])
    assert [(r.id, r.attempts) for r in store.recover()] == [(name, int(name == names[1])) for name in names]
    store.close()


def test_files_of_nobody_are_kept_while_they_are_new(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    old, new = store.pictures / "old.jpeg", store.pictures / "new.jpeg"
    for path in (old, new):
        path.write_bytes(b"jpeg")
    os.utime(old, (1, 1))
    store.expire(time.time() - 60)
    assert not old.exists() and new.exists()
    store.close()


def test_the_first_end_of_a_job_is_its_only_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    store.add(record("a"))
    store.fail("a", "no", {})
    store.complete("a", {})
    ended = store.get("a")
    assert ended is not None and (ended.status, ended.error) == (FAILED, "no")
    assert store.expire(time.time() + 1) == 1 and store.get("a") is None
    store.close()


def test_finished_jobs_and_their_pictures_are_forgotten_in_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    store.add(record("old"))
    store.save("f.jpeg", b"jpeg")
    store.complete("old", {})
    store.add(record("waiting", files=("w.jpeg",)))
    assert store.expire(time.time() - 3600) == 0 and (store.pictures / "f.jpeg").is_file()
    assert store.expire(time.time() + 3600) == 1
    assert store.get("old") is None and not (store.pictures / "f.jpeg").exists()
    assert store.get("waiting") is not None
    store.close()


def test_a_second_server_on_the_same_folder_reads_and_draws_but_takes_no_jobs(tmp_path: Path) -> None:
    holder, job, file = Store(tmp_path / "data"), "0" * 32, f"{'f' * 32}.jpeg"
    holder.open()
    holder.add(record(job, files=(file,)))
    with running(tmp_path / "data") as server:
        ready = server.http.get("/readyz")
        assert ready.status_code == 503
        why = "data is in use by another server: send new jobs to that one; this one reads its jobs, and takes over when it ends"
        assert ready.json() == {"ready": False, "why": [f"v2 jobs are not accepted: {why}"]}
        for body in ({"prompt": "a star"}, {"prompt": 1}):
            answer = server.post("/v2/demo-vegart", body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json() == {"error": why}
        assert server.http.get("/v2/requests/" + "1" * 32).status_code == 404
        start = time.monotonic()
        assert server.http.get(f"/v2/requests/{job}/status?hold=0.5").json()["status"] == QUEUED
        assert 0.4 <= time.monotonic() - start < 5
        threading.Timer(0.5, lambda: (holder.save(file, b"jpeg"), holder.complete(job, {}))).start()
        start = time.monotonic()
        assert server.ended(f"/v2/requests/{job}/status").json()["status"] == COMPLETED
        assert time.monotonic() - start < 10
        assert server.http.get(server.http.get(f"/v2/requests/{job}").json()["output"]).content == b"jpeg"
        assert server.post("/v1/demo-vegart").status_code == 200
        assert server.http.get("/healthz").status_code == 200
    holder.close()


def test_a_second_server_takes_over_when_the_first_is_killed(process: Process, tmp_path: Path) -> None:
    """Two processes. The second leaves the first's jobs alone, whatever they are, until it is gone; then it goes on."""
    second = Process(tmp_path)
    finished = process.submit("finished")
    assert process.wait(finished).json()["status"] == COMPLETED
    jobs = {f"p{i}": process.submit(f"p{i}") for i in range(8)}
    try:
        second.start("/healthz")
        picture = second.http.get(second.http.get(f"/v2/requests/{finished}").json()["output"])
        assert picture.headers["content-type"] == "image/jpeg"
        assert second.http.post("/v2/demo-vegart", json={"prompt": "other"}).status_code == 503
        assert second.wait(jobs["p1"]).json()["status"] == COMPLETED  # which the first one drew
        assert not second.answers("/readyz")
        kill(process)
        wait_until(lambda: second.answers("/readyz"), 15)
        assert {prompt: second.wait(job).json()["status"] for prompt, job in jobs.items()} == dict.fromkeys(
            jobs, COMPLETED
        )
        again = [prompt for prompt in set(second.drawn) if second.drawn.count(prompt) > 1]
        assert sorted(set(second.drawn)) == sorted([*jobs, "finished"]) and len(again) <= 1
        assert second.wait(second.submit("new")).json()["status"] == COMPLETED
        process.start("/healthz")  # as a supervisor would: now it is the second one
        assert not process.answers("/readyz")
        assert process.wait(finished).json()["status"] == COMPLETED
    finally:
        kill(second)


def test_a_second_server_leaves_a_damaged_database_where_it_is(tmp_path: Path) -> None:
    database, unknown = tmp_path / "jobs.sqlite", "/v2/requests/" + "0" * 32
    first = Store(tmp_path)
    first._own()
    with running(tmp_path) as server:
        assert server.http.get(unknown).status_code == 429  # the first one has not made it yet
        database.write_bytes(b"this is no database, " * 500)
        answer = server.http.get(unknown)
        assert (answer.status_code, answer.json()["error"]) == (
            429,
            "jobs.sqlite can't be used: file is not a database",
        )
        first.open()  # sets it aside
        assert server.http.get(unknown).status_code == 404
    assert first.set_aside is not None and list(tmp_path.glob("jobs-damaged-*.sqlite")) == [first.set_aside]
    first.close()


def test_whoever_could_not_open_the_database_leaves_the_folder_to_others(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")  # as a server of version 0.1 does
    first, second = Store(tmp_path), Store(tmp_path)
    with pytest.raises(StoreError, match="database is locked"):
        first.open()
    connection.close()
    second.open()
    with pytest.raises(Taken):
        first.open()
    second.close()
    first.open()
    first.close()


def test_a_damaged_database_is_set_aside_and_a_new_one_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"this is no database, " * 500)
    with running(tmp_path) as server:
        assert submitted(server) == COMPLETED
        (aside,) = tmp_path.glob("jobs-damaged-*.sqlite")
        assert aside.read_bytes().startswith(b"this is no database")
    assert f"the database of jobs was damaged; it is kept as {aside}, a new one is begun" in caplog.text


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(StoreError) as failure:
        Store(tmp_path).open()
    assert str(failure.value) == f"{tmp_path / 'jobs.sqlite'} can't be used: it is of version 7, this program reads 1"


def submitted(server: Running) -> str:
    answer = server.post("/v2/demo-vegart")
    assert answer.status_code == 200, answer.text
    return str(server.ended(answer.json()["status_url"]).json()["status"])


def test_a_full_disk_fails_the_job_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.serve.queue._RETRY_S", 0.1)
    with running(tmp_path) as server:
        replace = os.replace

        def full(a: object, b: object) -> None:
            if str(b).endswith(".jpeg"):
                raise OSError(28, "No space left on device")
            replace(a, b)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", full)
        job = server.post("/v2/demo-vegart").json()
        answer = server.ended(job["status_url"])
        assert answer.status_code == 422
        why = "the picture could not be kept: generations can't be used: No space left on device"
        assert answer.json()["error"] == why
        time.sleep(0.5)  # a few probes
        for body in ({"prompt": "a"}, {"prompt": 1}):  # nor is another one drawn for nothing
            refused = server.post("/v2/demo-vegart", body)
            assert refused.status_code == 429
            assert refused.json() == {"error": "generations can't be used: No space left on device"}
        ready = server.http.get("/readyz")
        why = "v2 jobs are not accepted: generations can't be used: No space left on device"
        assert (ready.status_code, ready.json()["why"]) == (503, [why])
        assert server.post("/v1/demo-vegart").status_code == 200
        monkeypatch.setattr(os, "replace", replace)
        wait_until(lambda: server.http.get("/readyz").status_code == 200)
        assert submitted(server) == COMPLETED
        assert len(list((tmp_path / "generations").iterdir())) == 1  # nothing is left of what it was tried with


def test_a_probe_needs_room_for_a_job_and_for_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.open()
    store.probe()
    assert store._read("SELECT * FROM jobs") == [] and list(store.pictures.iterdir()) == []

    def full(a: object, b: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="generations can't be used: No space left on device"):
            store.probe()
    connection = store._required()
    connection.execute("VACUUM")
    connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(StoreError, match="database or disk is full"):
        store.probe()
    assert store._read("SELECT * FROM jobs") == [] and list(store.pictures.iterdir()) == []
    store.close()


def test_a_folder_of_pictures_that_was_deleted_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.serve.queue._RETRY_S", 0.1)
    with running(tmp_path) as server:
        (tmp_path / "generations").rmdir()
        assert submitted(server) == FAILED
        wait_until(lambda: server.http.get("/readyz").status_code == 200)
        assert submitted(server) == COMPLETED


def test_a_database_that_can_not_grow_refuses_new_jobs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.serve.queue._RETRY_S", 0.1)
    with running(tmp_path) as server:
        store = server.service.queue._store
        pages = store._required().execute("PRAGMA page_count").fetchone()[0]
        store._required().execute(f"PRAGMA max_page_count={pages + 4}")
        answers = [server.post("/v2/demo-vegart", {"prompt": "x" * 3900}) for _ in range(8)]
        assert {a.status_code for a in answers} == {200, 429}
        full = next(a for a in answers if a.status_code == 429)
        assert full.json()["error"] == "jobs.sqlite can't be used: database or disk is full"
        time.sleep(0.5)  # a few probes
        assert server.http.get("/readyz").status_code == 503
        connection = store._required()
        connection.execute("PRAGMA max_page_count=100000")
        wait_until(lambda: server.http.get("/readyz").status_code == 200)
        assert submitted(server) == COMPLETED
        assert store._read("SELECT * FROM jobs WHERE model = ''") == []
        assert server.post("/v1/demo-vegart").status_code == 200


def test_a_model_that_is_gone_fails_its_old_jobs(tmp_path: Path) -> None:
    from dataclasses import replace

    store = Store(tmp_path)
    store.open()
    store.add(replace(record("0" * 32), model="gone"))
    store.close()
    with running(tmp_path, FakeDrawer()) as server:
        answer = server.ended("/v2/requests/" + "0" * 32 + "/status")
        assert (answer.status_code, answer.json()["error"]) == (422, "there is no model gone any more")
