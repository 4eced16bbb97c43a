"""The device's thread: order, fairness, batches, cancel, failures, models that come and go, and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vega_edge.errors import EngineError, VegaEdgeError
from vega_edge.serve.batching import Batching
from vega_edge.serve.job import Done, Failed, Overloaded, Started, Stepped, Stopping, TookTooLong
from vega_edge.serve.line import Line, Shares
from vega_edge.serve.residents import Residents
from vega_edge.serve.worker import Worker

from .serve_fakes import FakeDrawer, Gate, job

Make = Callable[..., Worker]


def test_a_job_is_drawn_and_heard_of(make_worker: Make) -> None:
    one = job(samples=2, steps=3)
    make_worker(FakeDrawer()).submit(one)
    done = one.listener.end()
    assert isinstance(done, Done)
    assert [image.getpixel((0, 0)) for image in done.images] == [(7, 0, 0), (8, 0, 0)]
    assert [type(e) for e in one.listener.events] == [Started, Stepped, Stepped, Stepped, Done]
    assert set(done.seconds) == {"queue", "text", "denoise", "decode", "draw"}


def test_clients_take_turns_whoever_came_first(make_worker: Make) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer, batch=1)
    worker.submit(job("first", steps=1))
    gate.wait()
    jobs = [job(f"greedy {i}", "greedy", steps=1) for i in range(3)] + [job("modest", "modest", steps=1)]
    for each in jobs:
        worker.submit(each)
    gate.let(5)
    for each in jobs:
        each.listener.end()
    assert drawer.batches[:3] in ([["first"], ["greedy 0"], ["modest"]], [["first"], ["modest"], ["greedy 0"]])


def test_what_waits_together_and_is_alike_is_one_batch(make_worker: Make) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer)
    worker.submit(job("first", steps=1))
    gate.wait()
    jobs = [
        job(p, f"client {p}", **o)
        for p, o in [("a", {}), ("b", {"seed": 9}), ("c", {"steps": 3}), ("d", {"samples": 2})]
    ]
    for each in jobs:
        worker.submit(each)
    gate.let(20)
    ends = {each.prompt: each.listener.end() for each in jobs}
    assert drawer.batches == [["first"], ["a", "b", "d"], ["c"]]
    assert [len(ends[p].images) for p in "abd"] == [1, 1, 2]
    assert ends["b"].images[0].getpixel((0, 0)) == (9, 0, 0)
    assert ends["a"].together == 4


def test_a_failing_batch_is_drawn_one_by_one(make_worker: Make) -> None:
    gate = Gate()

    def before(request: Any, index: int) -> None:
        gate(request, index)
        if len(drawer.batches[-1]) > 1 or request.prompt == "bad":
            raise EngineError("out of memory")

    drawer = FakeDrawer(before_step=before)
    worker = make_worker(drawer)
    worker.submit(job("first", steps=1))
    gate.wait()
    jobs = [job(p) for p in ("a", "bad", "b")]
    for each in jobs:
        worker.submit(each)
    gate.let(20)
    a, bad, b = [each.listener.end() for each in jobs]
    assert isinstance(a, Done) and isinstance(b, Done)
    assert isinstance(bad, Failed) and str(bad.error) == "out of memory"


def test_cancel_takes_effect_at_the_next_step_and_is_silent(make_worker: Make) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer)
    long, waiting, after = job("long", steps=50), job("waiting"), job("after", steps=1)
    worker.submit(long)
    gate.wait()
    worker.submit(waiting)
    worker.submit(after)
    worker.cancel(waiting)
    worker.cancel(long)
    gate.let(5)
    after.listener.end()
    assert drawer.steps == [("long", 1), ("after", 1)]
    assert [type(e) for e in long.listener.events] == [Started]
    assert waiting.listener.events == []


def test_a_live_picture_goes_between_the_steps_of_a_long_job(make_worker: Make) -> None:
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer)
    long, live = job("long", steps=4), job("live", "browser", live=True, steps=2)
    worker.submit(long)
    gate.wait()
    worker.submit(live)
    gate.let(50)
    live.listener.end()
    long.listener.end()
    assert drawer.steps.index(("live", 2)) < drawer.steps.index(("long", 4))
    assert [index for prompt, index in drawer.steps if prompt == "long"] == [1, 2, 3, 4]


def test_live_pictures_do_not_starve_the_queue(make_worker: Make) -> None:
    """A browser that asks for one picture after the other gets half of the device, not all of it."""
    gate = Gate()
    drawer = FakeDrawer(before_step=gate)
    worker = make_worker(drawer)
    long = job("long", steps=3)
    worker.submit(long)
    gate.wait()
    lives = [job(f"live {i}", "browser", live=True, steps=2) for i in range(60)]
    for each in lives:
        worker.submit(each)
    gate.let(500)
    lives[-1].listener.end()
    assert drawer.steps.index(("long", 3)) < drawer.steps.index(("live 59", 1))


def test_previews(make_worker: Make) -> None:
    for wanted, count in (("off", 0), ("on", 3)):
        drawer = FakeDrawer()
        one = job(live=True, steps=4, previews=wanted)
        make_worker(drawer).submit(one)
        one.listener.end()
        shown = [e for e in one.listener.events if isinstance(e, Stepped) and e.preview]
        assert len(shown) == drawer.previews == count


def test_a_full_queue_says_when_to_come_back(make_worker: Make) -> None:
    gate = Gate()
    worker = make_worker(FakeDrawer(before_step=gate), queue=2)
    worker.submit(job())
    gate.wait()
    worker.submit(job())
    worker.submit(job())
    with pytest.raises(Overloaded) as failure:
        worker.submit(job())
    assert str(failure.value) == "the queue is full (2 jobs wait); try again in 1 s"
    worker.submit(job(live=True))  # one a browser, which is a limit of its own
    worker.submit(job(), beyond_limit=True)
    gate.let(50)


def test_an_engine_that_raises_ends_its_job_only(make_worker: Make) -> None:
    def before(request: Any, index: int) -> None:
        if request.prompt == "ours":
            raise EngineError("the engine failed")
        if request.prompt == "defect":
            raise ZeroDivisionError

    worker = make_worker(FakeDrawer(before_step=before))
    jobs = [job(p, seed=i, steps=i + 1) for i, p in enumerate(("ours", "defect", "good"))]
    for each in jobs:
        worker.submit(each)
    ours, defect, good = [each.listener.end() for each in jobs]
    assert str(ours.error) == "the engine failed" and isinstance(defect.error, ZeroDivisionError)
    assert isinstance(good, Done)


def test_wrong_options_and_a_listener_that_raises_harm_nobody(make_worker: Make) -> None:
    worker = make_worker(FakeDrawer())
    wrong, deaf, good = job(steps=99), job(), job()
    deaf.listener = lambda event: 1 / 0  # type: ignore[assignment]
    for each in (wrong, deaf, good):
        worker.submit(each)
    assert str(wrong.listener.end().error) == "steps must be a whole number from 1 to 50, got 99"
    assert isinstance(good.listener.end(), Done)


def test_the_limit_of_time_for_one_job(make_worker: Make) -> None:
    long = job(steps=50)
    make_worker(FakeDrawer(), job_s=0.0).submit(long)
    end = long.listener.end()
    assert isinstance(end.error, TookTooLong)
    assert str(end.error) == "drawing took longer than the limit of 0 s; ask for fewer steps or a smaller picture"


def test_stopping_finishes_the_running_one_and_fails_the_rest(make_worker: Make) -> None:
    gate = Gate()
    worker = make_worker(FakeDrawer(before_step=gate), batch=1)
    running, waiting = job("running"), job("waiting")
    worker.submit(running)
    gate.wait()
    worker.submit(waiting)
    worker.stop(20)
    with pytest.raises(Stopping):
        worker.submit(job())
    gate.let(5)
    assert isinstance(running.listener.end(), Done)
    assert isinstance(waiting.listener.end().error, Stopping)
    assert worker.join(20)


def test_stopping_does_not_wait_longer_than_its_grace(make_worker: Make) -> None:
    gate = Gate()
    worker = make_worker(FakeDrawer(before_step=gate))
    running = job(steps=50)
    worker.submit(running)
    gate.wait()
    worker.stop(0)
    gate.let(50)
    assert isinstance(running.listener.end().error, Stopping)


def test_the_least_recently_used_model_makes_room() -> None:
    drawers = {name: FakeDrawer(name) for name in ("a", "b", "c", "huge")}
    sizes = {"a": 40, "b": 40, "c": 40, "huge": 200}
    swaps: list[tuple[str, str]] = []
    residents = Residents(
        drawers.__getitem__, sizes.__getitem__, 100, lambda action, name, s: swaps.append((action, name))
    )
    residents.get("a")
    residents.get("b")
    residents.get("a")
    assert residents.fits_beside("c", ["a"]) and not residents.fits_beside("c", ["a", "b"])
    residents.get("c")
    residents.get("a")
    assert swaps == [("open", "a"), ("open", "b"), ("close", "b"), ("open", "c")]
    assert drawers["b"].closed and not drawers["a"].closed
    assert residents.names == ["c", "a"] and residents.bytes == 80
    residents.get("b", kept=["c"])  # which is drawn with now, though used longest ago
    assert drawers["a"].closed and not drawers["c"].closed and residents.names == ["c", "b"]
    with pytest.raises(VegaEdgeError) as failure:
        residents.get("huge")
    assert str(failure.value) == "huge takes 0 MB, and the memory budget is 0 MB; raise --memory-budget"
    residents.close_all()
    assert drawers["c"].closed and residents.names == []


def test_a_budget_that_is_just_enough_closes_nothing() -> None:
    drawers = {name: FakeDrawer(name) for name in "abc"}
    residents = Residents(drawers.__getitem__, {"a": 60, "b": 40, "c": 1}.__getitem__, 100)
    residents.get("a")
    assert residents.fits_beside("b", ["a"]) and residents.fits_beside("a", ["a", "b"])
    residents.get("b")
    assert residents.names == ["a", "b"] and residents.bytes == 100
    assert not residents.fits_beside("c", ["a", "b"]) and residents.fits_beside("c", ["a"])
    residents.get("c")
    assert residents.names == ["b", "c"] and drawers["a"].closed


def test_batching_learns_what_is_faster() -> None:
    batching = Batching(4)
    assert batching.best("kind", [1, 2, 4]) == 4  # never tried: the largest
    batching.learn("kind", 4, 8.0)
    assert batching.best("kind", [1, 2, 4]) == 2
    batching.learn("kind", 2, 1.0)
    batching.learn("kind", 1, 0.9)
    assert batching.best("kind", [1, 2, 4]) == 2
    assert batching.best("kind", [1, 4]) == 1
    batching.learn("kind", 2, float("inf"))
    assert batching.best("kind", [1, 2, 4]) == 1


def test_batching_takes_the_least_of_the_last_few_and_forgets_in_time() -> None:
    batching = Batching(4)
    batching.learn("kind", 1, 1.0)
    batching.learn("kind", 2, 9.0)  # slowed by something else
    batching.learn("kind", 2, 1.0)
    assert batching.best("kind", [1, 2]) == 2
    for _ in range(3):
        batching.learn("kind", 2, 9.0)
    assert batching.best("kind", [1, 2]) == 1
    assert batching.best("another kind", [1, 2]) == 2
    assert 2 in [batching.best("kind", [1, 2]) for _ in range(200)]  # it is tried again


def test_shares_are_fair_and_remember_nobody_for_ever() -> None:
    shares = Shares()
    for name in "ab":
        shares.join(name)
    shares.charge("a", 3.0)
    assert shares.least("ab") == "b"
    shares.charge("b", 5.0)
    assert shares.least("ab") == "a"
    shares.join("late")  # starts level, without savings
    shares.charge("late", 0.1)
    assert shares.least(["a", "late"]) == "a"
    shares.charge("a", 10)
    shares.least(["late"])
    shares.forget([])
    line = Line()
    for i in range(100):
        one = job(client=f"client {i}")
        line.add(one)
        assert line.first() is one and line.remove(one) and not line.remove(one)
    assert len(line) == 0 and line.first() is None and len(line._shares._used) <= 1


def test_a_defect_in_what_waits_harms_nobody_else(make_worker: Make) -> None:
    """Waiting jobs are looked at when another begins, to draw them together."""
    gate = Gate()

    class Faulty(FakeDrawer):
        def request(self, prompt: str, **options: Any) -> Any:
            if prompt == "defect":
                raise ZeroDivisionError("a defect")
            return super().request(prompt, **options)

    worker = make_worker(Faulty(before_step=gate))
    first, good, defect, last = job("first"), job("good"), job("defect"), job("last")
    worker.submit(first)
    gate.wait()
    for each in (good, defect, last):
        worker.submit(each)
    gate.let(20)
    assert all(isinstance(each.listener.end(), Done) for each in (first, good, last))
    failed = defect.listener.end()
    assert isinstance(failed, Failed) and isinstance(failed.error, ZeroDivisionError)
    assert worker.alive


def test_a_walk_that_fails_as_it_is_given_up_harms_nobody_else(make_worker: Make) -> None:
    gate = Gate()

    class Clinging(FakeDrawer):
        def draw(self, requests: Any) -> Any:
            try:
                return (yield from super().draw(requests))
            except GeneratorExit:
                raise EngineError("it can't be freed") from None

    worker = make_worker(Clinging(before_step=gate), batch=1)
    one, other = job("one", steps=5), job("other")
    worker.submit(one)
    gate.wait()
    worker.cancel(one)
    worker.submit(other)
    gate.let(20)
    assert isinstance(other.listener.end(), Done)
    assert worker.alive and not one.listener.ended


def test_who_left_a_batch_hears_nothing_more(make_worker: Make) -> None:
    gate = Gate()
    worker = make_worker(FakeDrawer(before_step=gate), batch=2)
    worker.submit(job("first", steps=1))
    gate.wait()
    stays, leaves = job("stays", "one"), job("leaves", "two")
    worker.submit(stays)
    worker.submit(leaves)
    gate.let(1)
    gate.wait()
    worker.cancel(leaves)
    gate.let(2)
    done = stays.listener.end()
    assert isinstance(done, Done) and done.together == 2
    assert [type(event) for event in leaves.listener.events] == [Started]


def test_no_more_are_drawn_together_than_is_fastest(make_worker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, drawer = Gate(), FakeDrawer()
    drawer.before_step = gate
    worker = make_worker(drawer, batch=4)
    monkeypatch.setattr(Batching, "best", lambda self, kind, sizes: min(2, sizes[-1]))
    jobs = [job(name, steps=1) for name in ("first", "a", "b", "c")]
    worker.submit(jobs[0])
    gate.wait()
    for each in jobs[1:]:
        worker.submit(each)
    gate.let(4)
    assert all(isinstance(each.listener.end(), Done) for each in jobs)
    assert drawer.batches == [["first"], ["a", "b"], ["c"]]


def test_stopping_begins_no_live_picture_beside_the_running_one(make_worker: Make) -> None:
    gate, drawer = Gate(), FakeDrawer()
    drawer.before_step = gate
    worker = make_worker(drawer)
    running, live = job("running", steps=3), job("live", live=True)
    worker.submit(running)
    gate.wait()
    worker.submit(live)
    worker.stop(20)
    gate.let(20)
    assert isinstance(running.listener.end(), Done)
    failed = live.listener.end()
    assert isinstance(failed, Failed) and isinstance(failed.error, Stopping)
    assert drawer.batches == [["running"]]
