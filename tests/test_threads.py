"""Pipelines in programs that have threads, signals and an end of their own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vega_edge import EngineError, Pipeline
from vega_edge.engines import ENGINES, available, runs_on_cpu
from vega_edge.engines.checked import CheckedEngine
from vega_edge.engines.plan_engine import PlanEngine
from vega_edge.engines.plan_range import Rebuild

from .fake_device import FakeDevice, FakeProgram

CPU = tuple(name for name in ENGINES if runs_on_cpu(name))
STATES = {state.name: state for state in available()}
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
NO_ALARM = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no alarm signals")
PROMPTS = ("a red star", "a blue moon", "a green tree", "a big yellow circle")


@pytest.fixture(params=CPU)
def engine(request: pytest.FixtureRequest) -> str:
    if not STATES[request.param].ok:
        pytest.skip(STATES[request.param].why_not)
    return str(request.param)


def in_threads(work: Callable[[Any], Any], *given: Any) -> list[Any]:
    """What `work` gives or raises for each, all begun at the same moment."""
    results: list[Any] = [None] * len(given)
    start = threading.Barrier(len(given))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work(given[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_threads_draw_what_each_would_alone(engine: str, memory: str) -> None:
    with Pipeline.open("demo-vegart", engine, memory=memory) as pipe:

        def draw(prompt: str) -> Image.Image:
            steps = list(pipe.stream(prompt, **SMALL))
            steps[0].preview()
            image: Image.Image = pipe(prompt, **SMALL).images[0]
            return image

        alone = [draw(prompt) for prompt in PROMPTS]
        again = in_threads(draw, *PROMPTS)
    assert [error for error in again if isinstance(error, Exception)] == []
    assert all(map(same, alone, again))


def test_two_streams_in_one_thread_take_turns(engine: str) -> None:
    with Pipeline.open("demo-vegart", engine) as pipe:
        alone = [list(pipe.stream(prompt, **SMALL))[-1].latents for prompt in PROMPTS[:2]]
        pairs = list(zip(*(pipe.stream(prompt, **SMALL) for prompt in PROMPTS[:2]), strict=True))
    assert all(np.array_equal(a, step.latents) for a, step in zip(alone, pairs[-1], strict=True))


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_pipeline_closed_by_another_thread(engine: str, memory: str) -> None:
    """Whoever draws gets an error at its next run, of one line."""
    pipe = Pipeline.open("demo-vegart", engine, memory=memory)
    begun = threading.Event()

    def work(name: str) -> None:
        if name == "close":
            assert begun.wait(60)
            time.sleep(0.02)
            pipe.close()
        while name == "draw":
            for _ in pipe.stream("a star", width=64, height=64, steps=20):
                begun.set()

    closed, drawn, also = in_threads(work, "close", "draw", "draw")
    assert closed is None
    for error in (drawn, also):
        assert isinstance(error, EngineError) and "\n" not in str(error) and "open it again" in str(error)


def test_threads_open_one_network_for_all(engine: str) -> None:
    with Pipeline.open("demo-vegart", engine, memory="low") as pipe:
        images = in_threads(lambda prompt: pipe(prompt, **SMALL).images[0], *[PROMPTS[0]] * 4)
    assert all(same(images[0], image) for image in images[1:])


def test_threads_on_a_gpu_wait_for_each_other() -> None:
    """Buffers and captured graphs are one set for all: a run that begins in another's would mix them up."""

    class Slow(FakeDevice):
        def upload(self, pointer: Any, staging: Any) -> None:
            super().upload(pointer, staging)
            time.sleep(0.001)

    device = Slow()
    shapes = {"x": ((1, 1), (4, 4), (8, 8))}
    plan = PlanEngine(FakeProgram(device, [shapes]), device, Rebuild(""))
    engine = CheckedEngine(plan, "fake", Path("unet/model.onnx"))

    def run(seed: int) -> float:
        rng, worst = np.random.default_rng(seed), 0.0
        for i in range(20):
            x = rng.standard_normal((1 + (seed + i) % 4, 4)).astype(np.float32)
            b = np.full(1, seed, np.float32)
            worst = max(worst, float(np.abs(engine.run({"x": x, "b": b})["y"] - (2 * x + b)).max()))
        return worst

    assert in_threads(run, 1, 2, 3, 4) == [0.0] * 4
    engine.close()
    assert device.closed


SIGNALS = """
import os, signal, sys, threading, time
from vega_edge import Pipeline

heard = []
signal.signal(signal.SIGALRM, lambda *_: heard.append("alarm"))
signal.signal(signal.SIGINT, lambda *_: heard.append("interrupt"))

def check():
    del heard[:]
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    os.kill(os.getpid(), signal.SIGINT)
    while len(heard) < 2:
        time.sleep(0.001)

for i in range(20):
    pipes = [Pipeline.open("demo-vegart", sys.argv[1], verify=False) for _ in range(2)]
    for pipe in pipes:
        steps = pipe.stream("a star", width=64, height=64, steps=1)
        del heard[:]
        signal.setitimer(signal.ITIMER_REAL, 0.002)  # both somewhere in the run
        sender = threading.Timer(0.003, os.kill, (os.getpid(), signal.SIGINT))
        sender.start()
        next(steps)
        sender.join()
        while len(heard) < 2:
            time.sleep(0.001)
        check()
    for pipe in pipes if i % 2 else reversed(pipes):
        pipe.close()
        check()
    del pipe, pipes, steps
    check()
print("heard", i + 1)
"""


@NO_ALARM
def test_signals_are_handled_while_and_after_pipelines_are_open(engine: str) -> None:
    """Each pair is closed in one order and then in the other; 7 checks a pair, of two signals each, and two signals in each run."""
    done = subprocess.run([sys.executable, "-c", SIGNALS, engine], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard 20\n", "")


@NO_ALARM
@pytest.mark.parametrize("own", ["before", "after"])
def test_signals_when_the_program_has_a_core_of_its_own(own: str) -> None:
    if not STATES["openvino"].ok:
        pytest.skip(STATES["openvino"].why_not)
    make = "import vega_edge.engines.openvino, openvino as ov\nown = ov.Core()\nown.get_property('CPU', 'FULL_DEVICE_NAME')\n"
    draw = "from vega_edge import Pipeline\npipe = Pipeline.open('demo-vegart', 'openvino')\npipe('a', steps=1, width=64, height=64)\n"
    end = "del own\nimport os, signal\nsignal.signal(signal.SIGINT, lambda *_: print('heard'))\nos.kill(os.getpid(), 2)\npipe.close()\nos.kill(os.getpid(), 2)\n"
    at_the_end = "class Last:\n  def __del__(self, kill=os.kill, me=os.getpid()): kill(me, 28)\nsignal.signal(28, lambda *_: None)\nimport sys\nsys.last_one = Last()\n"
    code = (make + draw if own == "before" else draw + make) + end + at_the_end
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\nheard\n", "")


DAEMON = """
import sys, threading, time
from vega_edge import Pipeline

def draw():
    i = 0
    while True:
        i += 1
        for step in pipe.stream(f"a star {i}", steps=4, seed=1):
            step.preview()
            begun.set()

def reopen():
    while True:
        begun.set()
        Pipeline.open("demo-vegart", sys.argv[1], verify=False).close()

begun = threading.Event()
if sys.argv[2] == "draw":
    pipe = Pipeline.open("demo-vegart", sys.argv[1], verify=False)
for _ in range(2):
    threading.Thread(target=globals()[sys.argv[2]], daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[3]))
sys.exit(7)
"""


@pytest.mark.parametrize("work", ["draw", "reopen"])
def test_daemon_threads_leave_the_programs_exit_code(engine: str, work: str) -> None:
    for delay in ("0.01", "0.03", "0.08"):
        command = [sys.executable, "-c", DAEMON, engine, work, delay]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_a_pipeline_that_is_closed_at_exit_by_the_program() -> None:
    """By a function registered before ours, which runs after it, while a daemon thread would draw on."""
    code = (
        "import atexit\natexit.register(lambda: (pipe.close(), print('closed')))\n"
        "import threading, time\nfrom vega_edge import Pipeline\npipe = Pipeline.open('demo-vegart', 'onnxruntime-cpu')\n"
        "def draw():\n  while True:\n    pipe('a star', steps=1)\n"
        "for _ in range(2): threading.Thread(target=draw, daemon=True).start()\ntime.sleep(0.2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="Windows has no fork")
def test_a_child_forked_while_a_thread_draws_ends() -> None:
    code = (
        "import os, sys, threading, time, warnings\nwarnings.simplefilter('ignore')\nfrom vega_edge import Pipeline\n"
        "pipe = Pipeline.open('demo-vegart', 'onnxruntime-cpu')\n"
        "def draw():\n  while True:\n    pipe('a star', steps=1)\n"
        "threading.Thread(target=draw, daemon=True).start()\ntime.sleep(0.1)\n"
        "for _ in range(5):\n  time.sleep(0.01)\n  child = os.fork()\n  if not child:\n    import atexit\n    atexit._run_exitfuncs()\n    os._exit(3)\n"
        "  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
