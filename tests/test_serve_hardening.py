"""What must not end the device's thread, nor let one client or one bad job harm the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import EngineError
from vega_edge.serve.batching import Batching
from vega_edge.serve.drawing import Drawing
from vega_edge.serve.job import Done, Failed, Overloaded, Started, Stopping
from vega_edge.serve.store import Store, StoreError
from vega_edge.serve.worker import Worker

from .serve_fakes import FakeDrawer, Gate, job
from .serve_running import running, wait_until
from .test_serve_restart import record

Make = Callable[..., Worker]


def behind_a_gate(make_worker: Make, **options: Any) -> tuple[Worker, FakeDrawer, Gate]:
    """A worker that draws "first" and is held there."""
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer, **options)
    worker.submit(job("first", "first", steps=1))
    gate.wait()
    return worker, drawer, gate


def test_a_job_that_is_tried_again_is_drawn_alone(make_worker: Make) -> None:
    worker, drawer, gate = behind_a_gate(make_worker)
    jobs = [job(p) for p in ("a", "suspect", "b")]
    jobs[1].alone = True
    for each in jobs:
        worker.submit(each)
    gate.let(20)
    assert all(isinstance(each.listener.end(), Done) for each in jobs)
    assert drawer.batches == [["first"], ["a", "b"], ["suspect"]]


def fails_together(gate: Gate) -> FakeDrawer:
    def before(request: Any, index: int) -> None:
        gate(request, index)
        if len(drawer.batches[-1]) > 1:
            raise EngineError("out of memory")

    drawer = FakeDrawer(before_step=before)
    return drawer


def test_a_batch_that_failed_lets_live_pictures_in_between_and_starts_each_job_once(make_worker: Make) -> None:
    gate = Gate()
    drawer = fails_together(gate)
    worker = make_worker(drawer)
    worker.submit(job("first", steps=1))
    gate.wait()
    jobs = [job(p, steps=3) for p in "abc"]
    for each in jobs:
        worker.submit(each)
    gate.let(1)
    gate.wait()  # the batch, which is about to fail
    live = job("live", "browser", live=True, steps=1)
    worker.submit(live)
    gate.let(40)
    for each in (*jobs, live):
        assert isinstance(each.listener.end(), Done)
        assert [type(e) for e in each.listener.events].count(Started) == 1
    assert drawer.batches[1] == ["a", "b", "c"] and [b for b in drawer.batches if b[0] in "abc"][1:] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    assert drawer.batches.index(["live"]) < drawer.batches.index(["c"])


def test_a_batch_that_failed_while_stopping_is_not_drawn_again(make_worker: Make) -> None:
    gate = Gate()
    drawer = fails_together(gate)
    worker = make_worker(drawer)
    worker.submit(job("first", steps=1))
    gate.wait()
    jobs = [job(p) for p in "ab"]
    for each in jobs:
        worker.submit(each)
    gate.let(1)
    gate.wait()
    worker.stop(20)
    gate.let(20)
    for each in jobs:
        assert isinstance(each.listener.end().error, Stopping)
    assert drawer.batches == [["first"], ["a", "b"]]


def test_times_are_learned_by_steps_and_not_from_live_pictures(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[Any] = []
    monkeypatch.setattr(Batching, "learn", lambda self, kind, size, seconds: learned.append(kind))
    worker = make_worker(FakeDrawer())
    for each in (job(steps=4), job(steps=5), job(live=True, steps=6)):
        worker.submit(each)
        each.listener.end()
    assert len(learned) == 2 and learned[0] != learned[1]


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


def test_nothing_that_is_raised_ends_the_device_thread(make_worker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(request: Any, index: int) -> None:
        if request.prompt == "panic":
            raise Panic("a library in Rust")

    finish = Drawing._finish

    def faulty(self: Drawing, walk: Any, results: Any) -> None:
        if walk.jobs[0].prompt == "defect":
            results = [None]  # on which it breaks in the middle
        finish(self, walk, results)

    class Refusing(FakeDrawer):
        def draw(self, requests: Any) -> Any:
            if requests[0].prompt == "refused":
                raise Panic("at once")
            return super().draw(requests)

    monkeypatch.setattr(Drawing, "_finish", faulty)
    worker = make_worker(Refusing(before_step=before))
    for prompt, kind in (("panic", Panic), ("refused", Panic), ("defect", AttributeError)):
        bad, good = job(prompt), job("good")
        worker.submit(bad)
        failed = bad.listener.end()
        assert isinstance(failed, Failed) and isinstance(failed.error, kind)
        worker.submit(good)
        assert isinstance(good.listener.end(), Done) and worker.alive


def test_a_device_thread_that_ended_is_said_and_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Worker) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(threading, "excepthook", lambda details: None)
    with running(tmp_path) as server:
        monkeypatch.setattr(Worker, "_lane", broken)
        answer = server.post("/v1/demo-vegart")
        assert answer.status_code == 503  # it waited as the thread ended
        wait_until(lambda: not server.service.worker.alive)
        assert server.http.get("/readyz").json() == {"ready": False, "why": ["the device's thread has ended"]}
        assert server.http.get("/healthz").status_code == 500
        for version in (1, 2):
            answer = server.post(f"/v{version}/demo-vegart")
            assert answer.status_code == 500
            assert answer.json() == {"error": "the device's thread has ended; the log says why; restart the server"}


def test_one_client_can_not_fill_the_queue_for_the_others(make_worker: Make) -> None:
    worker, _, gate = behind_a_gate(make_worker, queue=4, batch=1)
    for _ in range(4):  # alone it may have all of it
        worker.submit(job(client="greedy"))
    with pytest.raises(Overloaded, match=r"^the queue is full \(4 jobs wait\); try again in 2 s$"):
        worker.require_room("greedy")
    for _ in range(2):
        worker.submit(job(client="modest"))
    with pytest.raises(Overloaded) as greedy:
        worker.submit(job(client="greedy"))
    assert str(greedy.value) == "4 of your jobs wait, and others wait too; try again in 2 s"
    with pytest.raises(Overloaded) as third:
        worker.submit(job(client="third"))
    assert str(third.value) == "the queue is full (6 jobs wait); try again in 2 s"
    gate.let(100)


def test_a_refused_job_costs_the_disk_nothing(tmp_path: Path) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate), queue=1) as server:
        assert server.post("/v2/demo-vegart").status_code == 200
        gate.wait()
        assert server.post("/v2/demo-vegart").status_code == 200
        seen: list[str] = []
        server.service.queue._store._required().set_trace_callback(seen.append)
        assert server.post("/v2/demo-vegart").status_code == 429
        assert not [text for text in seen if text.startswith(("INSERT", "DELETE"))]
        gate.let(50)


def test_a_job_that_is_refused_after_all_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have come while it was written down."""
    with running(tmp_path) as server:
        monkeypatch.setattr(server.service.worker, "require_room", lambda client: None)

        def full(job: Any, **options: Any) -> None:
            raise Overloaded("the queue is full", 1)

        monkeypatch.setattr(server.service.worker, "submit", full)
        answer = server.post("/v2/demo-vegart")
        assert (answer.status_code, answer.json()) == (429, {"error": "the queue is full"})
        queue = server.service.queue
        assert not queue._changed
    store = Store(tmp_path)
    store.open()
    assert store._read("SELECT * FROM jobs") == []
    store.close()


def test_a_defect_as_a_picture_is_kept_fails_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> bytes:
        raise ZeroDivisionError("secret detail")

    with running(tmp_path) as server:
        with monkeypatch.context() as patched:
            patched.setattr("vega_edge.serve.queue.encode", broken)
            job = server.post("/v2/demo-vegart").json()
            answer = server.ended(job["status_url"])
        assert (answer.status_code, answer.json()["status"]) == (422, "FAILED")
        assert answer.json()["error"] == "an internal error; it is in the log"
        assert 'vega_edge_errors_total{kind="ZeroDivisionError"} 1.0' in server.http.get("/metrics").text
        job = server.post("/v2/demo-vegart").json()
        assert server.ended(job["status_url"]).json()["status"] == "COMPLETED"


def test_a_drawing_waits_until_it_is_on_disk_that_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, stores, seen = Store.begin, [], []

    def slow(self: Store, name: str) -> None:
        time.sleep(0.3)
        begin(self, name)
        stores.append(self)

    def before(request: Any, index: int) -> None:
        seen.extend(tuple(row) for store in stores for row in store._read("SELECT status, attempts FROM jobs"))

    monkeypatch.setattr(Store, "begin", slow)
    with running(tmp_path, FakeDrawer(before_step=before)) as server:
        answer = server.post("/v2/demo-vegart", {"prompt": "a", "num_inference_steps": 1}).json()
        assert server.ended(answer["status_url"]).json()["status"] == "COMPLETED"
    assert seen == [("PROCESSING", 1)]


def test_jobs_that_were_tried_before_come_back_alone_and_the_others_together(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    for name in "abcd":
        store.add(record(name * 32, files=(f"{name}.jpeg",)))
    for name in "bc":
        store.begin(name * 32)
    store.close()
    drawer = FakeDrawer()
    with running(tmp_path, drawer) as server:
        wait_until(lambda: sum(map(len, drawer.batches)) == 4)
        for name in "bc":
            status = server.ended(f"/v2/requests/{name * 32}/status").json()
            assert status["metrics"]["retry_count"] == 1
    assert sorted(len(batch) for batch in drawer.batches if len(batch) > 1) in ([], [2])


def test_a_queue_that_could_not_be_read_takes_no_jobs_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Store) -> list[Any]:
        raise StoreError("the jobs can't be read")

    monkeypatch.setattr("vega_edge.serve.queue._RETRY_S", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "recover", broken)
        with running(tmp_path) as server:
            for body in ({"prompt": "a"}, {"prompt": 1}):
                answer = server.post("/v2/demo-vegart", body)
                assert (answer.status_code, answer.json()) == (429, {"error": "the jobs can't be read"})
            patched.undo()
            wait_until(lambda: server.http.get("/readyz").status_code == 200)
            assert server.post("/v2/demo-vegart").status_code == 200


def test_housekeeping_goes_on_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.open()
    store.pictures.rmdir()
    with pytest.raises(StoreError) as failure:
        store.expire(0.0)
    assert str(failure.value) == f"{store.pictures} can't be used: No such file or directory"
    store.close()
    calls: list[float] = []

    def defect(self: Store, before: float) -> int:
        calls.append(before)
        raise ZeroDivisionError

    monkeypatch.setattr("vega_edge.serve.queue._HOUSEKEEPING_S", 0.02)
    monkeypatch.setattr(Store, "expire", defect)
    with running(tmp_path):
        wait_until(lambda: len(calls) > 2)


def test_a_model_that_is_gone_and_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    store = Store(tmp_path)
    store.open()
    store.add(replace(record("0" * 32), model="gone"))
    store.add(record("1" * 32, files=("b.jpeg",)))
    store.close()

    def full(self: Store, *arguments: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "fail", full)
    with running(tmp_path) as server:
        gone = server.ended("/v2/requests/" + "0" * 32 + "/status")
        assert (gone.status_code, gone.json()["error"]) == (422, "there is no model gone any more")
        assert server.ended("/v2/requests/" + "1" * 32 + "/status").json()["status"] == "COMPLETED"
        monkeypatch.undo()
        queue = server.service.queue
        asyncio.run_coroutine_threadsafe(queue._tidy(), queue._loop).result(20)  # what its housekeeping does
        assert not queue._lost
        assert server.http.get("/v2/requests/" + "0" * 32).json()["error"] == "there is no model gone any more"
