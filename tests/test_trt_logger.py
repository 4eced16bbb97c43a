"""The real TensorRT-RTX, which holds a lock while it calls Python: in processes that can be killed where they hang."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vega_edge.collector import uncollected
from vega_edge.models import recipes

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
GRAPH = Path(recipes()["demo-vegart"].bundle_path) / "vae_decoder" / "model.onnx"
START = f"""
import gc, logging, sys, threading, time
sys.path[:] = {sys.path!r}
from pathlib import Path
from vega_edge.errors import VegaEdgeError
from vega_edge.export.trt_library import load_library
from vega_edge.export.trt_network import read_inputs
rtx, graph = load_library("tensorrt-rtx"), Path({str(GRAPH)!r})
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_one_that_nobody_holds_any_more_is_not_collected_while_another_is_made() -> None:
    """A caller that kept an error keeps the frames that it went through, in a circle."""
    run(
        "class Quiet(rtx.module.ILogger):\n"
        "    def __init__(self): rtx.module.ILogger.__init__(self)\n"
        "    def log(self, severity, message): pass\n"
        "class Collecting(logging.NullHandler):\n"
        "    def handle(self, record): gc.isenabled() and gc.collect()\n"
        "logging.basicConfig(level='INFO', handlers=[Collecting()])\n"
        "left = [rtx.module.Builder(Quiet())]; left.append(left); del left\n"
        "read_inputs(rtx, graph); print('done')"
    )


def test_two_threads_at_once(tmp_path: Path) -> None:
    """A log that is written somewhere lets the other thread in. What is made for a damaged graph ends with the error."""
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    run(
        f"damaged = Path({str(tmp_path / 'damaged.onnx')!r})\n"
        "def fail():\n"
        "    try: read_inputs(rtx, damaged)\n"
        "    except VegaEdgeError: pass\n"
        "class Slow(logging.NullHandler):\n"
        "    def handle(self, record): 'createInferBuilder' in record.getMessage() and time.sleep(0.05)\n"
        "logging.basicConfig(level='INFO', handlers=[Slow()])\n"
        "threads = [threading.Thread(target=lambda: [(fail(), fail(), read_inputs(rtx, graph)) for _ in range(4)], daemon=True) for _ in 'abc']\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; print('done')"
    )


def test_a_graph_that_can_not_be_read_leaves_nothing_in_its_error() -> None:
    from vega_edge.engines.trt_logger import _turn
    from vega_edge.errors import EngineError
    from vega_edge.export.trt_library import Library
    from vega_edge.export.trt_network import read_inputs

    from .fake_tensorrt import Builder, FakeTensorRT

    ended = []

    class Watched(Builder):
        def __del__(self) -> None:
            ended.append(_turn.locked())

    fake = FakeTensorRT(parse=("node", "Operator", "unknown"))
    fake.Builder = lambda logger: Watched(fake, logger)
    with pytest.raises(EngineError) as caught:
        read_inputs(Library("tensorrt-rtx", fake), GRAPH)
    assert caught.value.__traceback__ is not None
    assert ended == [True]


def test_the_collector_comes_back_with_the_last_of_two_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    gc.enable()
    with uncollected():
        thread.start()
        assert inside.wait(20)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


@pytest.mark.parametrize("on", [True, False])
def test_a_collector_is_left_as_it_was_found(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ZeroDivisionError), uncollected():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
