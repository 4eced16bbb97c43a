"""What is decided about a plan on a device: buffers, uploads, profiles, contexts, CUDA graphs. On a GPU of numpy."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from vega_edge.engines.device_io import Buffers, Held, is_constant
from vega_edge.engines.plan_engine import PlanEngine
from vega_edge.engines.plan_range import Rebuild, SeveralPlans, choose_profile, find_outside
from vega_edge.errors import EngineError
from vega_edge.export.trt_profiles import Range, Sizes, batch_range, profile, size_range

from .fake_device import FakeDevice, FakeProgram

WIDE = {"x": ((1, 1), (1, 8), (4, 64))}


class Bench:
    def __init__(self, profiles=(WIDE,), **options):
        self.device = FakeDevice()
        self.program = FakeProgram(self.device, profiles)
        self.engine = PlanEngine(self.program, self.device, Rebuild("vega-edge build X"), **options)
        self.calls = self.device.calls

    def run(self, x, b=0.5):
        b = b if isinstance(b, np.ndarray) else np.float32([b])
        got = self.engine.run({"x": x, "b": b})["y"]
        np.testing.assert_array_equal(got, 2 * x + b)
        return got


def x(batch=1, n=8, start=0):
    return np.arange(start, start + batch * n, dtype=np.float32).reshape(batch, n)


def constant(values):
    values = np.float32(values)
    values.flags.writeable = False
    return values


def test_the_first_run_warms_up_the_second_captures_the_third_replays():
    bench = Bench()
    bench.run(x())
    assert (bench.calls["launch"], bench.calls["capture"], bench.calls["replay"]) == (1, 0, 0)
    bench.run(x(start=3))
    assert (bench.calls["launch"], bench.calls["capture"], bench.calls["replay"]) == (1, 1, 1)
    bench.run(x(start=9))
    assert (bench.calls["launch"], bench.calls["capture"], bench.calls["replay"]) == (1, 1, 2)


def test_without_graphs_every_run_launches():
    bench = Bench(graphs=False)
    for i in range(3):
        bench.run(x(start=i))
    assert (bench.calls["launch"], bench.calls["capture"]) == (3, 0)


def test_what_cannot_be_captured_says_so_once_and_runs(caplog):
    bench = Bench()
    bench.device.refuse_capture = True
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            bench.run(x(start=i))
    assert [r.getMessage() for r in caplog.records] == [
        "this plan can't be captured as a CUDA graph, and runs without one, slower: "
        "operation not permitted when stream is capturing"
    ]
    assert bench.calls["launch"] == 4


def test_a_context_that_the_library_would_not_capture_is_never_captured(caplog):
    bench = Bench()
    bench.program.capturable = False
    for i in range(3):
        bench.run(x(start=i))
    assert [r.getMessage() for r in caplog.records] == [
        "this plan can't be captured as a CUDA graph, and runs without one, slower: not this one"
    ]
    assert (bench.calls["launch"], bench.calls["capture"]) == (3, 0)


def test_each_shape_has_a_graph_of_its_own():
    bench = Bench()
    for _ in range(3):
        bench.run(x(2, 8))
        bench.run(x(1, 4))
    assert (bench.program.opened, bench.calls["capture"], bench.calls["replay"]) == (2, 2, 4)


def test_the_shape_used_longest_ago_goes_when_there_are_too_many():
    bench = Bench()
    bench.run(x(4, 64))  # the largest first: later ones move no buffer
    for n in (1, 2, 3):
        bench.run(x(1, n))
        bench.run(x(1, n))
    bench.run(x(4, 64))
    assert (bench.program.opened, len(bench.program.contexts), len(bench.device.graphs)) == (4, 4, 4)
    bench.run(x(1, 5))  # n = 1 goes
    assert (bench.program.opened, len(bench.program.contexts), len(bench.device.graphs)) == (5, 4, 3)
    bench.run(x(4, 64))
    assert bench.program.opened == 5
    bench.run(x(1, 1))
    assert bench.program.opened == 6


def test_a_prompt_and_a_size_that_change_after_the_capture_are_what_is_drawn():
    """A captured graph reads the addresses of its capture: none may move under it, and none may keep an old value."""
    bench, prompts, draw = Bench(), [constant([i]) for i in range(3)], np.random.default_rng(0)
    for start in range(3):
        bench.run(x(1, 8, start), prompts[0])
    for prompt in (prompts[1], prompts[0]):
        for batch, n in ((1, 8), (4, 8), (1, 8), (1, 64), (1, 8)):  # each larger one moves the buffers
            bench.run(x(batch, n, 7), prompt)
    for start in range(200):
        kept = prompts[draw.integers(3)] if draw.random() < 0.5 else np.float32([draw.random()])
        bench.run(x(int(draw.integers(1, 5)), int(draw.integers(1, 65)), start), kept)
    assert bench.calls["replay"] > 5


def test_a_buffer_that_moves_ends_the_graphs_that_know_its_old_place():
    bench = Bench()
    for _ in range(3):
        bench.run(x(1, 4))
    before = bench.calls["capture"]
    bench.run(x(2, 64))
    assert not bench.device.graphs
    for _ in range(3):
        bench.run(x(1, 4, start=7))
    assert bench.calls["capture"] == before + 1


def test_after_a_move_the_first_run_warms_up_again():
    """Bound to another place a library may compile and allocate anew, which a capture may not contain."""
    bench = Bench()
    for _ in range(3):
        bench.run(x(1, 4))
    bench.run(x(2, 64))
    launched, captured = bench.calls["launch"], bench.calls["capture"]
    bench.run(x(1, 4, start=7))
    assert (bench.calls["launch"], bench.calls["capture"]) == (launched + 1, captured)


def test_scratch_memory_is_that_of_the_largest_shape_met():
    """Of the largest that could come it may be gigabytes, on boards that have eight."""
    bench = Bench()
    assert bench.device.allocated == {}  # nothing is taken before the first run
    for _ in range(3):
        bench.run(x(1, 64))
    assert bench.device.allocated[bench.engine._scratch].size == 8
    bench.run(x(4, 8))
    assert bench.device.allocated[bench.engine._scratch].size == 32
    assert len(bench.device.allocated) == 4
    captured = bench.calls["capture"]
    for i in range(3):
        bench.run(x(1, 64, start=i))  # its graph knew the old place
    assert bench.calls["capture"] == captured + 1
    assert bench.device.allocated[bench.engine._scratch].size == 32


def test_no_room_for_more_scratch_memory_leaves_the_engine_working():
    bench = Bench()
    bench.run(x(4, 8))
    bench.run(x(1, 8))
    bench.engine._free_scratch()
    allocate, bench.device.allocate = bench.device.allocate, refuse_allocation
    bench.engine._unbind()
    with pytest.raises(EngineError, match=r"^full$"):
        bench.run(x(4, 8))
    bench.device.allocate = allocate
    bench.run(x(1, 8))
    bench.run(x(4, 8))
    bench.engine.close()
    assert bench.device.allocated == {}


def refuse_allocation(size):
    raise EngineError("full")


def test_what_was_constant_is_sent_again_after_another_value():
    held, fixed, changing = Held(), constant([1, 2]), np.float32([3, 4])
    assert [held.changed({"x": array}) for array in (fixed, fixed, changing, fixed)] == [["x"], [], ["x"], ["x"]]


def test_a_constant_is_sent_again_where_its_buffer_moved_though_nothing_took_its_place():
    """Another buffer's allocation may fail in between."""
    buffers, fixed = Buffers(FakeDevice()), constant([1, 2])
    buffers.reserve({"x": 8})
    assert (buffers.upload({"x": fixed}), buffers.upload({"x": fixed})) == (["x"], [])
    assert buffers.reserve({"x": 16})
    assert buffers.upload({"x": fixed}) == ["x"]


def test_buffers_grow_and_stay():
    bench = Bench()
    bench.run(x(4, 64))
    allocated = bench.calls["allocate"]
    for i in range(50):
        bench.run(x(1 + i % 4, 1 + i))
    assert bench.calls["allocate"] == allocated
    assert len(bench.device.allocated) == 4  # x, b, y, scratch


def test_a_constant_feed_is_sent_once():
    bench = Bench()
    b = constant([3])
    for i in range(4):
        bench.run(x(start=i), b)
    assert bench.calls["upload"] == 4 + 1
    bench.run(x(), constant([4]))  # another array, though it may lie where the first one did
    bench.run(x(), b)
    assert bench.calls["upload"] == 6 + 3


def test_a_writable_feed_changed_in_place_is_seen():
    bench = Bench()
    b = np.float32([1])
    bench.run(x(), b)
    b[:] = 9
    assert bench.run(x(), b)[0, 0] == 9


def test_a_read_only_view_of_memory_that_can_change_is_sent_each_time():
    bench = Bench()
    b = np.float32([1])
    view = b[:]
    view.flags.writeable = False
    bench.run(x(), view)
    b[:] = 9
    assert bench.run(x(), view)[0, 0] == 9


def test_a_held_feed_survives_a_change_of_shape_but_not_of_its_buffer():
    bench = Bench()
    b = constant([3])
    bench.run(x(1, 4), b)
    uploads = bench.calls["upload"]
    bench.run(x(1, 3), b)
    assert bench.calls["upload"] == uploads + 1
    bench.run(x(4, 64), b)  # x and y move, b stays
    assert bench.calls["upload"] == uploads + 2
    big = constant(np.arange(64).reshape(1, 64))
    bench.run(big, b)
    bench.run(constant(np.ones((4, 64))), b)
    bench.run(big, b)


def test_what_is_constant():
    frozen = constant([1, 2])
    assert is_constant(frozen)
    assert is_constant(frozen[:1])
    assert is_constant(np.frombuffer(b"1234", np.float32))
    assert not is_constant(np.float32([1]))
    writable = bytearray(4)
    shared = np.frombuffer(writable, np.float32)
    shared.flags.writeable = False
    assert not is_constant(shared)


def test_results_belong_to_the_caller():
    bench = Bench()
    first = bench.run(x())
    kept = first.copy()
    first += 100
    bench.run(x(start=5))
    np.testing.assert_array_equal(first, kept + 100)


def test_feeds_in_any_memory_order():
    bench = Bench()
    bench.run(np.asfortranarray(x(3, 5)))
    bench.run(np.repeat(x(3, 5), 2, axis=1)[:, ::2])


def test_close_frees_everything():
    bench = Bench()
    for shape in ((1, 4), (1, 4), (2, 8)):
        bench.run(x(*shape))
    bench.engine.close()
    assert (bench.device.allocated, bench.device.pinned, bench.device.graphs) == ({}, {}, {})
    assert bench.program.closed
    assert bench.device.closed


def test_two_engines_have_buffers_of_their_own():
    device = FakeDevice()
    engines = [PlanEngine(FakeProgram(device, [WIDE]), device, Rebuild("")) for _ in range(2)]
    for i in range(4):
        for k, engine in enumerate(engines):
            given = x(1, 8, start=10 * i + k)
            np.testing.assert_array_equal(engine.run({"x": given, "b": np.float32([k])})["y"], 2 * given + k)


def test_each_run_makes_the_device_the_threads_own():
    """A server may run a model in another thread than the one that opened it."""
    bench = Bench()
    bench.run(x())
    bench.run(x())
    assert bench.calls["activate"] == 2


# profiles

SMALL, LARGE = {"x": ((1, 1), (1, 8), (1, 16))}, {"x": ((1, 8), (2, 32), (4, 64))}


@pytest.mark.parametrize(
    ("shape", "index"), [((1, 8), 0), ((1, 16), 0), ((1, 17), 1), ((2, 8), 1), ((4, 64), 1), ((1, 1), 0)]
)
def test_the_profile_that_fits_and_is_nearest(shape, index):
    assert choose_profile([SMALL, LARGE], {"x": shape, "b": (1,)}, Rebuild("")) == index


UNET = {
    "sample": ((1, 4, 64, 64), (2, 4, 64, 96), (2, 4, 64, 128)),
    "encoder_hidden_states": ((1, 77, 8), (2, 77, 8), (2, 231, 8)),
}
FIXED = {"sample": ((1, 4, 64, 64),) * 3, "encoder_hidden_states": ((1, 77, 8),) * 3}
BUILD = "vega-edge build B --engine tensorrt --part unet"


def unet(batch, height, width, tokens=77):
    return {"sample": (batch, 4, height, width), "encoder_hidden_states": (batch, tokens, 8)}


@pytest.mark.parametrize(
    ("profile", "shapes", "message"),
    [
        (UNET, unet(1, 64, 130), "input 'sample' is 1x4x64x130, but axis 3 was built for 64 to 128; widen it: {build} --size 512x512:768x512:1040x512 --batch 1:2:2"),
        (UNET, unet(3, 64, 64), "input 'sample' is 3x4x64x64, but axis 0 was built for 1 to 2; widen it: {build} --size 512x512:768x512:1024x512 --batch 1:2:3"),
        (UNET, unet(1, 32, 64), "input 'sample' is 1x4x32x64, but axis 2 was built for 64 to 64; widen it: {build} --size 512x256:768x512:1024x512 --batch 1:2:2"),
        (UNET, unet(1, 64, 64, 308), "input 'encoder_hidden_states' is 1x308x8, but axis 1 was built for 77 to 231; prompts stop at 3 chunks of 77 tokens: shorten it"),
        (FIXED, unet(1, 64, 64, 154), "input 'encoder_hidden_states' is 1x154x8, but axis 1 was built for 77 to 77; widen it: {build} --size 512x512:512x512:512x512 --batch 1:1:1"),
        (FIXED, unet(2, 64, 64), "input 'sample' is 2x4x64x64, but axis 0 was built for 1 to 1; widen it: {build} --size 512x512:512x512:512x512 --batch 1:1:2"),
        ({"input_ids": ((1, 77), (1, 77), (6, 77))}, {"input_ids": (8, 77)}, "input 'input_ids' is 8x77, but axis 0 was built for 1 to 6; prompts stop there: shorten it"),
        ({"input_ids": ((1, 77),) * 3}, {"input_ids": (2, 77)}, "input 'input_ids' is 2x77, but axis 0 was built for 1 to 1; widen it: {build}"),
    ],
)  # fmt: skip
def test_outside_every_profile(profile, shapes, message):
    """What the error says to run builds another engine, which takes these shapes and the old ones."""
    with pytest.raises(EngineError) as caught:
        choose_profile([profile], shapes, Rebuild(BUILD, 8))
    assert str(caught.value) == message.format(build=BUILD)


def unet_profile(sizes):
    inputs = {"sample": (-1, 4, -1, -1), "encoder_hidden_states": (-1, -1, 8)}
    return profile("unet", inputs, sizes, 8)


SIDES = (Range(512, 512, 1024),) * 2
GUIDED, TWICE, ONCE = Range(1, 1, 2), Range(1, 2, 2), Range(1, 1, 1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("guided", [GUIDED, TWICE, ONCE])
@pytest.mark.parametrize("pictures", [Range(1, 1, 4), Range(2, 2, 2), Range(2, 3, 4)])
def test_what_is_told_to_be_run_takes_these_shapes(static, guided, pictures):
    """Its --size and --batch, as `vega-edge build` reads them, and the model's guidance."""
    asked = Sizes(*SIDES, pictures, guided)
    if static:
        asked = asked.static()
    built = unet_profile(asked)
    for got in (unet(1, 64, 64), unet(9, 64, 64), unet(2, 64, 160), unet(4, 48, 160, 154), unet(2, 64, 64, 154)):
        outside = find_outside(built, got)
        if outside is None:
            continue
        told = (
            Rebuild(BUILD, 8, tuple(asked.batch), static).cure(built, got, outside).removeprefix(f"widen it: {BUILD} ")
        )
        options = dict(re.findall(r"--(size|batch) (\S+)", told))
        sizes = Sizes(*size_range(options["size"]), batch_range(options["batch"]), guided)
        rebuilt = unet_profile(sizes.static() if "--static" in told else sizes)
        if "--static" not in told:  # the old ones too; a static engine stays beside the new one
            assert all(find_outside(rebuilt, {k: shapes[i] for k, shapes in built.items()}) is None for i in range(3))
        assert find_outside(rebuilt, got) is None
        assert ("--static" in told) <= static


@pytest.mark.parametrize(
    ("rebuild", "profile", "shapes", "options"),
    [
        (Rebuild(BUILD, 8, (1, 1, 4)), ((1, 4, 64, 64), (2, 4, 64, 64), (8, 4, 64, 64)), unet(2, 64, 128), "--size 512x512:512x512:1024x512 --batch 1:1:4"),
        (Rebuild(BUILD, 8, (1, 1, 4)), ((1, 4, 64, 64), (2, 4, 64, 64), (8, 4, 64, 64)), unet(9, 64, 64), "--size 512x512:512x512:512x512 --batch 1:1:5"),
        (Rebuild(BUILD, 8, (1, 1, 1), True), ((2, 4, 64, 64),) * 3, unet(4, 64, 128), "--static --size 1024x512 --batch 2"),
        (Rebuild(BUILD, 8, (1, 1, 1), True), ((2, 4, 64, 64),) * 3, unet(1, 64, 64), "--size 512x512:512x512:512x512 --batch 1:1:1"),
    ],
)  # fmt: skip
def test_guidance_is_not_taken_for_pictures(rebuild, profile, shapes, options):
    with pytest.raises(EngineError) as caught:
        choose_profile([{"sample": profile}], shapes, rebuild)
    assert str(caught.value).endswith(f"; widen it: {BUILD} {options}")


def test_several_plans_are_tried_in_order_and_opened_when_they_are_needed():
    engines = {}

    def open_plan(index):
        engines[index] = Bench([(SMALL, LARGE)[index]]).engine
        return engines[index]

    both = SeveralPlans([SMALL, LARGE], open_plan)
    assert both.inputs == engines[0].inputs and both.outputs == engines[0].outputs
    b = np.float32([1])
    for shape, opened in (((1, 8), [0]), ((1, 16), [0]), ((2, 9), [0, 1]), ((1, 4), [0, 1])):
        given = np.ones(shape, np.float32)
        assert (both.run({"x": given, "b": b})["y"] == 3).all()
        assert sorted(engines) == opened
    with pytest.raises(EngineError, match="but axis 0 was built for 1 to 1"):
        both.run({"x": np.ones((5, 8), np.float32), "b": b})
    both.close()
    assert all(engine._device.closed for engine in engines.values())


def test_a_plan_without_free_axes_takes_its_one_shape():
    assert choose_profile([{}], {"x": (1, 8)}, Rebuild("")) == 0
    assert choose_profile([], {"x": (1, 8)}, Rebuild("")) == 0


def test_a_refused_shape_leaves_the_engine_working():
    bench = Bench()
    bench.run(x())
    with pytest.raises(EngineError):
        bench.engine.run({"x": x(5, 8), "b": np.float32([0])})
    bench.run(x())


def test_constants_are_sent_again_after_an_upload_that_was_interrupted(monkeypatch):
    """Ctrl-C in a notebook, then the same picture: the text that was to be sent after it must not count as sent."""
    device = FakeDevice()
    buffers, old, new = Buffers(device), constant([1, 1]), constant([2, 2])
    buffers.reserve({"sample": 8, "text": 8})
    buffers.upload({"sample": np.zeros(2, np.float32), "text": old})
    feeds = {"sample": np.ones(2, np.float32), "text": new}
    upload = device.upload
    monkeypatch.setattr(device, "upload", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        buffers.upload(feeds)
    monkeypatch.setattr(device, "upload", upload)
    assert buffers.upload(feeds) == ["sample", "text"]
    assert buffers.upload(feeds) == ["sample"]


def _interrupted(*args):
    raise KeyboardInterrupt
