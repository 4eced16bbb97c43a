"""How TensorRT's library is called to run a plan; made-up ones stand for the library and the GPU."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from vega_edge.engines import LazyWeights, nvidia, tensorrt
from vega_edge.engines.plan_store import Plan, PlanLora, PlanStore, graph_hash
from vega_edge.engines.protocol import Opening
from vega_edge.errors import EngineError

from .fake_device import FakeDevice
from .fake_runtime import Context, FakeRuntime, OldContext, SizedContext, UnsureContext

pytest.importorskip("filelock")
RANGES = {"x": ((1, 4), (1, 4), (8, 4))}
HASHES = (("ab" * 32, 0.5),)
LORA = LazyWeights(lambda: {"w": np.ones(3, np.float32)}, HASHES)
SET_LORA = ("set", "w", [1, 1, 1])


class Device(FakeDevice):
    index, stream = 0, 7

    def memory(self):
        return 1_500_000_000, 8_000_000_000


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "bundle" / "unet" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"graph")
    return path


@pytest.fixture
def start(monkeypatch, graph):
    """start(library, plan's flags, plan's weights, how) -> the engine, on the GPU "RTX 4090"."""
    monkeypatch.setattr(tensorrt, "CudaDevice", lambda index: Device())
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: "sm_89")
    monkeypatch.setattr(nvidia, "devices", lambda: ["RTX 4090"])

    def open_plan(trt, flags=(), built_with=None, **how):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
        store = PlanStore(graph.parent.parent)
        plan = Plan("", "", 0, "unet/model.onnx", graph_hash(graph), "tensorrt-rtx", "1.7", ("ampere+",), RANGES,
                    flags=flags, loras=tuple(PlanLora(*lora) for lora in HASHES) if built_with else ())  # fmt: skip
        store.add(plan, b"plan", 0)
        return tensorrt.open_graph(graph, "tensorrt_rtx", Opening(**how))

    return open_plan


def run(engine, n=1):
    engine.run({"x": np.zeros((n, 4), np.float32)})


def refused(call, *args, **options):
    with pytest.raises(EngineError) as caught:
        call(*args, **options)
    return str(caught.value)


def cache_file(folder, graph, flags=()):
    """Of the plan in its bundle with these flags."""
    (key,) = (plan.key for plan in PlanStore(graph.parent.parent).plans() if plan.flags == flags)
    return folder / f"RTX-4090-{key[:16]}.rtxcache"


def test_compiled_kernels_are_kept_after_a_first_run(start, graph, tmp_path):
    """A process that is killed, or does not close its pipeline, has them too."""
    trt = FakeRuntime()
    engine = start(trt, cache=tmp_path / "cache")
    file = cache_file(tmp_path / "cache", graph)
    run(engine)
    assert file.read_bytes() == b"kernel"
    written = file.stat().st_mtime_ns
    trt.compiles = False
    run(engine, 2)  # another context, nothing new
    assert file.stat().st_mtime_ns == written
    trt.compiles = True
    run(engine, 3)
    assert file.read_bytes() == b"kernel" * 2
    again = FakeRuntime(known=[b"kernel" * 2])
    again.compiles = False
    written = file.stat().st_mtime_ns
    second = start(again, cache=tmp_path / "cache")
    run(second)
    second.close()
    assert again.cache.content == b"kernel" * 2
    assert file.stat().st_mtime_ns == written


def test_a_cache_of_another_driver_is_made_anew(start, graph, tmp_path, caplog):
    engine = start(FakeRuntime(), cache=tmp_path / "cache")
    file = cache_file(tmp_path / "cache", graph)
    file.parent.mkdir()
    file.write_bytes(b"old")
    with caplog.at_level(logging.INFO, "vega_edge"):
        run(engine)
    assert f"{file} is of another driver or version; it is made anew" in caplog.text
    assert file.read_bytes() == b"kernel"


def test_a_cache_that_can_not_be_written_is_a_warning(start, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    run(start(FakeRuntime(), cache=tmp_path / "cache"))
    assert "can't be kept (" in caplog.text and ": the next start compiles again" in caplog.text


def test_plans_of_one_graph_have_a_cache_each(start, graph, tmp_path):
    """Else the one that is written last would drop what the other compiled."""
    first = start(FakeRuntime(), cache=tmp_path)
    run(first)
    run(start(FakeRuntime(), flags=("static",), cache=tmp_path))
    files = [cache_file(tmp_path, graph, flags) for flags in ((), ("static",))]
    assert [file.read_bytes() for file in files] == [b"kernel"] * 2


def test_a_library_that_gives_no_cache_ends_no_picture(start, graph, tmp_path, caplog):
    trt = FakeRuntime()
    trt.cache.serialize = lambda: None
    engine = start(trt, cache=tmp_path)
    run(engine)
    file = cache_file(tmp_path, graph)
    assert not file.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} can't be kept (the library gives nothing to keep): the next start compiles again"
    ]


def test_a_plan_that_takes_no_cache_runs_without(start, tmp_path, caplog):
    engine = start(FakeRuntime(refuses=("cache",)), cache=tmp_path / "cache")
    run(engine)
    assert "takes no cache of compiled kernels" in caplog.text


def test_tensorrt_has_no_such_cache(start, tmp_path):
    engine = start(FakeRuntime(rtx=False), cache=tmp_path / "cache")
    run(engine)
    engine.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        (SizedContext, [200, 300], [("scratch", 200), ("scratch", 300), ("scratch", 100)]),
        (OldContext, [200, 300], ["scratch"] * 3),
        (Context, [1_000_000], [("scratch", 1_000_000)] * 3),
        (UnsureContext, [1_000_000], [("scratch", 1_000_000)] * 3),
    ],
)
def test_scratch_memory_is_asked_for_each_shape_where_the_library_tells(start, kind, sizes, told):
    """Else it is the largest shape's: without any, the library would write anywhere."""
    trt = FakeRuntime(kind)
    engine, taken = start(trt), []
    allocate = engine._device.allocate
    engine._device.allocate = lambda size: taken.append(size) or allocate(size)
    for n in (2, 3, 1):
        run(engine, n)
    assert [size for size in taken if size >= 200] == sizes  # x and y take 48 bytes at most
    assert [what for what in trt.told if "scratch" in what] == told


@pytest.mark.parametrize(
    ("trt", "flags", "captured", "warned"),
    [
        (FakeRuntime(), (), 1, []),
        (FakeRuntime(), ("weight-streaming",), 0, []),
        (FakeRuntime(refuses=["capture"]), (), 0, [
            "this plan can't be captured as a CUDA graph, and runs without one, slower: the library says that its runs "
            "can't be captured; build it again with vega-edge build"
        ]),
    ],
    ids=["as built", "weights move", "built before"],
)  # fmt: skip
def test_what_is_captured(start, trt, flags, captured, warned, caplog):
    engine = start(trt, flags=flags)
    for _ in range(3):
        run(engine)
    assert engine._device.calls["capture"] == captured
    assert [record.getMessage() for record in caplog.records] == warned


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("profile", "profile 0 can't be used: the library gave no reason"),
        ("y", "'y' can't be bound to its memory: the library gave no reason"),
    ],
)
def test_what_the_library_refuses_is_told(start, what, message):
    assert refused(lambda: run(start(FakeRuntime(refuses=[what])))) == message


@pytest.mark.parametrize(
    ("finds", "why"),
    [
        (0, "the library gave no reason; build it again with vega-edge build"),
        (2, "it was not built for this GPU, sm_89; build it with vega-edge build --target sm_89"),
        (16, "the GPU has 1.5 of 8.0 GB free, too little for it; close what else uses it (see nvidia-smi), or use "
         "--memory low"),
    ],
)  # fmt: skip
def test_a_plan_that_fails_is_asked_for_its_faults(start, graph, finds, why):
    messages = [
        refused(start, FakeRuntime(refuses=["plan"], finds=finds)),
        refused(lambda: run(start(FakeRuntime(context_class=None, finds=finds)))),
    ]
    (plan,) = PlanStore(graph.parent.parent).plans()
    assert messages == [f"{plan.file} can't be loaded: {why}", f"{plan.file} can't be run: {why}"]


def test_tensorrt_can_not_be_asked(start, graph):
    message = refused(start, FakeRuntime(refuses=["plan"], finds=16, rtx=False))
    assert message.endswith(" can't be loaded: the library gave no reason; build it again with vega-edge build")


def test_a_lora_is_put_over_all_of_the_bundles_weights(start, graph):
    """The library combines weights, and refuses one of them alone."""
    trt = FakeRuntime()
    start(trt, flags=("refit",), weights=LORA)
    assert trt.told == [("load", b"plan"), ("all of", str(graph)), SET_LORA, "refit"]


@pytest.mark.parametrize(("lora", "told"), [({}, []), (LORA, [SET_LORA])])
def test_a_stripped_plan_gets_the_weights_it_was_built_with(start, graph, lora, told):
    trt = FakeRuntime()
    start(trt, flags=("stripped",), built_with=lora, weights=lora)
    assert trt.told == [("load", b"plan"), ("all of", str(graph)), *told, "refit"]


def test_a_plan_with_its_weights_is_not_refitted(start):
    for flags, lora in ((), {}), (("refit",), {}), ((), LORA), (("refit",), LORA):
        trt = FakeRuntime()
        start(trt, flags=flags, built_with=lora, weights=lora)
        assert trt.told == [("load", b"plan")]


def test_refitting_that_fails_says_how_many_are_missing(start):
    message = refused(start, FakeRuntime(missing=["a", "b"]), flags=("refit",), weights=LORA)
    assert message == "refitting failed (2 weights are missing): the library gave no reason"


def test_refitting_with_a_graph_that_does_not_fit_tells_what_its_parser_found(start):
    """Some versions log it, some keep it to themselves."""
    message = refused(start, FakeRuntime(refuses=["graph"]), flags=("refit",), weights=LORA)
    assert message == "unet/model.onnx does not fit the engine built of it: no weights of that name"


def test_a_plan_that_can_not_be_refitted_is_closed_before_its_device(start, monkeypatch):
    """Whoever keeps the error would keep the plan's memory on the GPU."""
    closed = []
    for kind in (tensorrt._Program, Device):
        monkeypatch.setattr(kind, "close", lambda self, kind=kind: closed.append(kind.__name__))
    refused(start, FakeRuntime(refuses=["graph"]), flags=("refit",), weights=LORA)
    assert closed == ["_Program", "Device"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_replaced_weights_are_handed_over_in_their_own_type(start, dtype):
    """uint16 holds the bits of bfloat16."""
    trt, new = FakeRuntime(), np.arange(6).reshape(3, 2).astype(dtype)
    start(trt, flags=("refit",), weights={"w": new})
    assert ("set", "w", [0, 1, 2, 3, 4, 5]) in trt.told
