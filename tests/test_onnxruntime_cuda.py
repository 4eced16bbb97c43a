"""onnxruntime on a GPU: what is bound, captured and said; a made-up session stands for the GPU."""

from __future__ import annotations

import json
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

NODES = {"get_inputs": "x", "get_outputs": "y"}


class Value:
    """An OrtValue."""

    def __init__(self, array):
        self.array = np.array(array)

    def update_inplace(self, array):
        self.array[...] = array

    def numpy(self):
        return self.array.copy()


class Session:
    """y = -x. `ids`: the gpu_graph_id of each run."""

    def __init__(self, fail=None):
        self.ids, self.fail = [], fail

    def io_binding(self):
        bound = SimpleNamespace(inputs={}, outputs={})
        bound.bind_ortvalue_input = bound.inputs.__setitem__
        bound.bind_ortvalue_output = bound.outputs.__setitem__
        bound.bind_output = lambda name, kind, gpu: bound.outputs.__setitem__(name, None)
        bound.get_outputs = lambda: list(bound.outputs.values())
        return bound

    def run_with_iobinding(self, binding, options):
        if self.fail:
            raise RuntimeError(self.fail)
        self.ids.append(options.get_run_config_entry("gpu_graph_id"))
        y = -binding.inputs["x"].array
        if binding.outputs["y"] is None:
            binding.outputs["y"] = Value(y)
        binding.outputs["y"].update_inplace(y)


for method, name in NODES.items():
    node = SimpleNamespace(name=name, type="tensor(float)", shape=["n"])
    setattr(Session, method, lambda self, node=node: [node])


@pytest.fixture
def opened(monkeypatch):
    kind = SimpleNamespace(ortvalue_from_numpy=lambda array, device, gpu: Value(array))
    monkeypatch.setattr(cuda.ort, "OrtValue", kind)
    return lambda **options: cuda.BoundEngine(Session(**options), 0, captures=True)


def run(engine, n):
    x = np.arange(n, dtype=np.float32)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], -x)


def test_the_second_run_of_a_shape_is_captured_and_the_third_replayed(opened):
    engine = opened()
    for _ in range(3):
        run(engine, 5)
    assert engine._session.ids == ["-1", "1", "1"]


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
