"""The real TensorRT-RTX, which holds a lock while it calls Python: in processes that can be killed where they hang."""

from __future__ import annotations

import gc
import subprocess
import sys
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


def test_two_threads_at_once() -> None:
    """A log that is written somewhere lets the other thread in."""
    run(
        "class Slow(logging.NullHandler):\n"
        "    def handle(self, record): 'createInferBuilder' in record.getMessage() and time.sleep(0.05)\n"
        "logging.basicConfig(level='INFO', handlers=[Slow()])\n"
        "threads = [threading.Thread(target=lambda: [read_inputs(rtx, graph) for _ in range(4)], daemon=True) for _ in 'abc']\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; print('done')"
    )


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
