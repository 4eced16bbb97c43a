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
from .fake_runtime import Context, FakeRuntime, LaterContext

pytest.importorskip("filelock")
RANGES = {"x": ((1, 4), (1, 4), (8, 4))}
HASHES = (("ab" * 32, 0.5),)
LORA = LazyWeights(lambda: {"w": np.ones(3, np.float32)}, HASHES)


class Device(FakeDevice):
    index, stream = 0, 7

    def memory_left(self):
        return 1, 2


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


def test_compiled_kernels_are_kept_after_a_first_run(start, tmp_path):
    """A process that is killed, or does not close its pipeline, has them too."""
    trt, file = FakeRuntime(), tmp_path / "cache" / "RTX-4090.rtxcache"
    engine = start(trt, cache=tmp_path / "cache")
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


def test_a_cache_of_another_driver_is_made_anew(start, tmp_path, caplog):
    file = tmp_path / "cache" / "RTX-4090.rtxcache"
    file.parent.mkdir()
    file.write_bytes(b"old")
    with caplog.at_level(logging.INFO, "vega_edge"):
        run(start(FakeRuntime(), cache=tmp_path / "cache"))
    assert f"{file} is of another driver or version; it is made anew" in caplog.text
    assert file.read_bytes() == b"kernel"


def test_a_cache_that_can_not_be_written_is_a_warning(start, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    run(start(FakeRuntime(), cache=tmp_path / "cache"))
    assert "can't be kept (" in caplog.text and ": the next start compiles again" in caplog.text


def test_tensorrt_has_no_such_cache(start, tmp_path):
    engine = start(FakeRuntime(rtx=False), cache=tmp_path / "cache")
    run(engine)
    engine.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("kind", "sizes"), [(None, [200, 300]), (Context, [1_000_000]), (LaterContext, [1_000_000])])
def test_scratch_memory_is_asked_for_each_shape_where_the_library_tells(start, kind, sizes):
    """Else it is the largest shape's."""
    trt = FakeRuntime() if kind is None else FakeRuntime(kind)
    engine, taken = start(trt), []
    allocate = engine._device.allocate
    engine._device.allocate = lambda size: taken.append(size) or allocate(size)
    for n in (2, 3, 1):
        run(engine, n)
    assert [size for size in taken if size >= 200] == sizes  # x and y take 48 bytes at most
    assert trt.told.count("scratch") == (3 if kind is None else 0)
    assert trt.told.count(("scratch", 1_000_000)) == (0 if kind is None else 3)


def test_a_lora_is_put_over_all_of_the_bundles_weights(start, graph):
    """The library combines weights, and refuses one of them alone."""
    trt = FakeRuntime()
    start(trt, flags=("refit",), weights=LORA)
    assert trt.told == [("load", b"plan"), ("all of", str(graph)), ("set", "w"), "refit"]


@pytest.mark.parametrize(("lora", "told"), [({}, []), (LORA, [("set", "w")])])
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
    with pytest.raises(EngineError) as caught:
        start(FakeRuntime(missing=["a", "b"]), flags=("refit",), weights=LORA)
    assert str(caught.value) == "refitting failed (2 weights are missing): the library gave no reason"
