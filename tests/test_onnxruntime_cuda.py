"""onnxruntime on a GPU: what is bound, captured and said; a made-up session stands for the GPU."""

from __future__ import annotations

import json
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")

from vega_edge import engines  # noqa: E402
from vega_edge.engines import onnxruntime as common  # noqa: E402
from vega_edge.engines import onnxruntime_cuda as cuda  # noqa: E402
from vega_edge.engines.protocol import Opening  # noqa: E402
from vega_edge.errors import EngineError  # noqa: E402
from vega_edge.manifest import MANIFEST  # noqa: E402
from vega_edge.models import find_bundle  # noqa: E402

NODES = {"get_inputs": ("x", "prompt"), "get_outputs": ("y",)}


class Value:
    """An OrtValue on a GPU: another one may share its memory, which is freed with the last of them."""

    def __init__(self, memory):
        self.memory, self.fail = memory, None

    def update_inplace(self, array):
        assert (array.dtype, array.size) == (self.memory.dtype, self.memory.size)
        if self.fail:
            raise self.fail
        self.memory[...] = array

    def numpy(self):
        return self.memory.copy()


class Binding:
    """Inputs and outputs by name; an output that is bound to the device alone gets its memory in the next run."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value

    def bind_output(self, name, kind, gpu):
        assert (kind, gpu) == ("cuda", 0)
        self.outputs[name] = None

    def get_outputs(self):
        return [Value(value.memory) for value in self.outputs.values()]


class Session:
    """y = prompt - x. `ids`: the gpu_graph_id of each run.

    A run whose id was captured replays: it reads and writes the memory of that time, and ignores what is bound. The
    library holds addresses, so that memory which was freed since is an error here.
    """

    def __init__(self, fail=None):
        self.ids, self.fail, self.graphs, self.running = [], fail, {}, False

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        if self.fail:
            raise RuntimeError(self.fail)
        assert not self.running, "a capture in CUDA's global mode meets the work of another thread"
        self.running = True
        time.sleep(0)
        graph_id = options.get_run_config_entry("gpu_graph_id")
        self.ids.append(graph_id)
        if graph_id in self.graphs:
            memory = [place() for place in self.graphs[graph_id]]
            assert all(each is not None for each in memory), "replayed after its memory was freed"
        else:
            x, prompt = (binding.inputs[name].memory for name in NODES["get_inputs"])
            if binding.outputs["y"] is None:
                assert graph_id == "-1", "captured while an output has no place of its own"
                binding.outputs["y"] = Value(np.full_like(x, np.nan))
            memory = x, prompt, binding.outputs["y"].memory
            if graph_id != "-1":
                self.graphs[graph_id] = [weakref.ref(each) for each in memory]
        x, prompt, y = memory
        y[...] = prompt - x
        self.running = False


for method, names in NODES.items():
    nodes = [SimpleNamespace(name=name, type="tensor(float)", shape=["n"]) for name in names]
    setattr(Session, method, lambda self, nodes=nodes: nodes)


@pytest.fixture
def opened(monkeypatch):
    kind = SimpleNamespace(ortvalue_from_numpy=lambda array, device, gpu: Value(np.array(array)))
    monkeypatch.setattr(cuda.ort, "OrtValue", kind)
    return lambda **options: cuda.BoundEngine(Session(**options), 0, captures=True)


def run(engine, n, seed=0, prompt=None):
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    prompt = np.float32([seed]) if prompt is None else prompt
    np.testing.assert_array_equal(engine.run({"x": x, "prompt": prompt})["y"], prompt - x)


def constant(value):
    array = np.float32([value])
    array.setflags(write=False)
    return array


def test_the_second_run_of_a_shape_is_captured_and_the_third_replayed(opened):
    engine = opened()
    for _ in range(3):
        run(engine, 5)
    assert engine._session.ids == ["-1", "1", "1"]


def test_a_prompt_and_a_size_that_change_after_the_capture_are_what_is_drawn(opened):
    """A captured graph reads the addresses of its capture: no value may move, and none may stay behind."""
    engine, prompts, draw = opened(), [constant(i) for i in range(3)], np.random.default_rng(0)
    for n in (4, 8):
        for seed in range(3):
            run(engine, n, seed, prompts[0])  # captured and replayed
    for prompt in (prompts[1], prompts[0]):
        for n in (4, 8, 4):  # guided and not, or another batch
            run(engine, n, 5, prompt)
    for seed in range(200):  # more sizes than are kept, so that their memory is freed and taken again
        kept = prompts[draw.integers(3)] if draw.random() < 0.5 else np.float32([draw.random()])
        run(engine, int(draw.integers(1, 8)), seed, kept)
    assert set(engine._session.graphs) == engine.captured == {"1", "2", "3", "4"}


def test_a_prompt_that_changes_in_place_is_sent_again(opened):
    engine, prompt = opened(), np.float32([1])
    for value in (1, 2, 3, 3, 4):
        prompt[:] = value
        run(engine, 4, 0, prompt)


def test_what_was_not_sent_is_sent_by_the_next_run(opened):
    engine, first, second = opened(), constant(1), constant(2)
    for prompt in (first, first):
        run(engine, 4, 0, prompt)
    (bound,) = engine._bound.values()
    bound.inputs["prompt"].fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(engine, 4, 0, second)
    bound.inputs["prompt"].fail = None
    run(engine, 4, 0, second)


def test_threads_run_one_at_a_time(opened):
    """CUDA's global capture mode: another thread's allocation or copy would end the capture."""
    engine, failures = opened(), []

    def work(seed):
        try:
            for i in range(50):
                run(engine, 1 + i % 3, seed)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_onnxruntime_keeps_every_graph_so_that_only_a_few_shapes_get_one(opened):
    engine = opened()
    for _ in range(2):
        for n in range(1, 8):
            run(engine, n)
            run(engine, n)
    assert {graph_id for graph_id in engine._session.ids if graph_id != "-1"} == {"1", "2", "3", "4"}
    assert len(engine._bound) == 4  # values of the others are not kept
    assert engine._session.ids[-2:] == ["-1", "-1"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Failed to allocate memory for requested buffer of size 3000000000", "GPU 0 has too little memory for 3000 MB; close what else uses it (see nvidia-smi), draw smaller or fewer pictures, or use --memory low"),
        ("CUDA failure 2: out of memory ; GPU=0", "GPU 0 has too little memory; close what else uses it (see nvidia-smi), draw smaller or fewer pictures, or use --memory low"),
    ],
)  # fmt: skip
def test_too_little_memory_has_a_cure(opened, said, message):
    with pytest.raises(EngineError) as caught:
        run(opened(fail=said), 1)
    assert str(caught.value) == message


def test_another_failure_is_its_own(opened):
    with pytest.raises(RuntimeError, match="something else"):
        run(opened(fail="something else"), 1)


# what a provider is told, and whether it is there


def test_cudas_libraries_are_found_in_another_folder_than_onnxruntimes(monkeypatch, tmp_path, capsys):
    """As with a virtual environment over the system's packages: preload_dlls looks beside onnxruntime alone."""
    lib = tmp_path / "nvidia" / "cu13" / ("bin" if sys.platform == "win32" else "lib")
    lib.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    asked = []

    def preload(cuda=True, cudnn=True, msvc=True, directory=None):
        asked.append(directory)
        print(f"Failed to load, looked in {directory}")

    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [common.CUDA])
    common._require(common.CUDA)
    assert str(lib) in asked
    assert asked[-1] is None  # then where it looks by itself
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("Failed")) == ("", 1)


@pytest.mark.parametrize(
    ("manifest", "half", "brain"),
    [({"dtype": "fp16"}, True, False), ({"dtype": "bf16"}, False, True), ({"dtype": "fp32", "weights": "fp16"}, False, False)],
)  # fmt: skip
def test_tensorrt_computes_in_what_the_graph_says(tmp_path, manifest, half, brain):
    told = json.loads((find_bundle("demo-vegart") / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**told, **manifest}))
    settings = cuda._tensorrt(tmp_path / "unet" / "model.onnx", Opening(gpu=1))
    assert settings == {"device_id": 1, "trt_fp16_enable": half, "trt_bf16_enable": brain}


@pytest.mark.parametrize(("dtype", "half"), [("f2", True), ("f4", False)])
def test_without_a_manifest_the_weights_say_it(tmp_path, dtype, half):
    onnx = pytest.importorskip("onnx")
    w = onnx.numpy_helper.from_array(np.ones((2, 2), dtype), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [w])
    path = tmp_path / "unet" / "model.onnx"
    path.parent.mkdir()
    onnx.save(onnx.helper.make_model(graph), path)
    assert cuda._tensorrt(path, Opening())["trt_fp16_enable"] is half


def test_one_node_opens_on_the_cpu():
    common.try_provider("CPUExecutionProvider", {})
    options = ort.SessionOptions()
    session = ort.InferenceSession(common._ONE_NODE, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([2])})[0].tolist() == [-2]


@pytest.mark.parametrize(
    ("provider", "why"),
    [
        ("CUDAExecutionProvider", "CUDA's or cuDNN's libraries are missing, or are not of the version that onnxruntime {version} wants; pip install \"vega-edge[cuda]\" brings them"),
        ("TensorrtExecutionProvider", "TensorRT's libraries are missing, or are not of the version that onnxruntime {version} wants; install TensorRT from NVIDIA, or use onnxruntime-cuda"),
    ],
)  # fmt: skip
def test_a_provider_that_can_not_be_loaded_is_no_device(monkeypatch, provider, why):
    """Its file is there, and listed; its libraries are not. onnxruntime takes the CPU then, and says nothing that raises."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **kwargs: session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.TENSORRT, common.CUDA, "CPUExecutionProvider"])
    with pytest.raises(EngineError) as caught:
        cuda.device(provider)
    assert str(caught.value) == f"asked for {provider}, got CPUExecutionProvider: {why.format(version=ort.__version__)}"


def test_what_tensorrt_leaves_to_cuda_must_not_run_on_the_cpu(monkeypatch, tmp_path):
    given = []

    def open_session(*args, providers, **kwargs):
        given.append([name for name, *_ in providers])
        return SimpleNamespace(get_providers=lambda: [cuda.TENSORRT, "CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.TENSORRT, common.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(cuda, "_arithmetic", lambda path: "fp32")
    for call in (lambda: cuda.open_graph(tmp_path, cuda.TENSORRT, Opening()), lambda: cuda.device(cuda.TENSORRT)):
        with pytest.raises(EngineError) as caught:
            call()
        assert str(caught.value) == (
            f"asked for CUDAExecutionProvider, got {cuda.TENSORRT}, CPUExecutionProvider: CUDA's or cuDNN's libraries are "
            f"missing, or are not of the version that onnxruntime {ort.__version__} wants; "
            'pip install "vega-edge[cuda]" brings them'
        )
    assert given == [[cuda.TENSORRT, common.CUDA], [cuda.TENSORRT], [common.CUDA]]


def test_auto_and_doctor_believe_no_provider_that_can_not_be_loaded(monkeypatch):
    monkeypatch.setattr(engines.choice, "missing_here", lambda name: None if name.startswith("onnx") else missing)
    missing = engines.choice.Missing("it is not installed", "")
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **kwargs: session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [common.CUDA, "CPUExecutionProvider"])
    name, passed = engines.best_engine()
    assert name == "onnxruntime-cpu"
    assert passed[2].startswith("onnxruntime-cuda (asked for CUDAExecutionProvider, got CPUExecutionProvider: ")
    monkeypatch.setattr(engines.status, "missing_here", lambda name: None if name.startswith("onnx") else missing)
    state = next(state for state in engines.available() if state.name == "onnxruntime-cuda")
    assert (state.ok, state.why_not[:40]) == (False, "asked for CUDAExecutionProvider, got CPU")
