"""Which engine `auto` takes, and what is said about one that can't be had; every machine is pretended."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from vega_edge import engines
from vega_edge.engines import checked, choice, nvidia, status
from vega_edge.errors import EngineError


@pytest.fixture
def graph(tmp_path):
    """No graph: it is never opened here."""
    path = tmp_path / "model.onnx"
    path.touch()
    return path


def refused(call, *args):
    with pytest.raises(EngineError) as caught:
        call(*args)
    return str(caught.value)


def found(monkeypatch, tmp_path, **packages):
    """Makes the given packages the only ones there: 'cpu', 'cuda', 'broken' or None for not installed."""

    def find_spec(package):
        kind = packages.get(package)
        if kind is None:
            return None
        if kind == "broken":
            return ModuleSpec(package, None)
        folder = tmp_path / package
        (folder / "capi").mkdir(parents=True, exist_ok=True)
        if kind == "cuda":
            (folder / "capi" / "libonnxruntime_providers_cuda.so").touch()
        return ModuleSpec(package, None, origin=str(folder / "__init__.py"))

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


class Driver:
    """The CUDA driver's functions that nvidia.py calls."""

    def __init__(self, names, code=0):
        self.names, self.code = names, code

    def cuInit(self, flags):
        return self.code

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index + 40
        return 0

    def cuDeviceGetName(self, buffer, size, device):
        name = self.names[device.value - 40]
        buffer.value = (name or "").encode()[: size - 1]
        return 0 if name else 1


def no_driver(library):
    raise OSError("not found")


NO_TENSORRT = "tensorrt-rtx (tensorrt_rtx is not installed); tensorrt (tensorrt is not installed)"
NO_DRIVER = f"there is no NVIDIA driver ({nvidia.LIBRARY} can't be loaded)"


@pytest.mark.parametrize(
    ("packages", "gpus", "chosen", "passed"),
    [
        ({"onnxruntime": "cuda", "openvino": "cpu"}, ["RTX 4090"], "onnxruntime-cuda", NO_TENSORRT),
        (
            {"onnxruntime": "cuda", "openvino": "cpu"},
            None,
            "openvino",
            f"{NO_TENSORRT}; onnxruntime-cuda ({NO_DRIVER})",
        ),
        (
            {"onnxruntime": "cpu"},
            None,
            "onnxruntime-cpu",
            f"{NO_TENSORRT}; onnxruntime-cuda (this onnxruntime was built without CUDA); "
            "openvino (openvino is not installed)",
        ),
        ({"openvino": "cpu"}, None, "openvino", f"{NO_TENSORRT}; onnxruntime-cuda (onnxruntime is not installed)"),
    ],
)
def test_auto(monkeypatch, tmp_path, caplog, packages, gpus, chosen, passed):
    found(monkeypatch, tmp_path, **packages)
    monkeypatch.setattr(nvidia.ctypes, "CDLL", (lambda library: Driver(gpus)) if gpus else no_driver)
    monkeypatch.setattr(choice, "_not_loaded", lambda name: None)  # all is well with what is installed
    with caplog.at_level(logging.INFO, "vega_edge"):
        assert engines.choose_engine() == chosen
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"engine {chosen}, chosen automatically; passed over: {passed}")
    ]


def test_auto_with_nothing_installed(monkeypatch, tmp_path):
    found(monkeypatch, tmp_path)
    assert refused(engines.choose_engine) == (
        f"no engine can be used: {NO_TENSORRT}; onnxruntime-cuda (onnxruntime is not installed); openvino (openvino is not installed);"
        ' onnxruntime-cpu (onnxruntime is not installed); pip install "vega-edge[cpu]"'
    )


@pytest.mark.parametrize(("packages", "cure"), [({}, ""), ({"onnxruntime": "cpu"}, "pip uninstall onnxruntime, then ")])
def test_a_gpu_that_no_engine_can_use(monkeypatch, tmp_path, packages, cure):
    found(monkeypatch, tmp_path, **packages)
    for device in ("cuda", "cuda:1"):
        said = refused(partial(engines.choose_engine, device=device))
        assert said.split("; ")[-1] == f'{cure}pip install "vega-edge[cuda]", or leave --device out'


@pytest.mark.parametrize(
    ("packages", "name", "message"),
    [
        ({}, "onnxruntime-cpu", 'onnxruntime is not installed; pip install "vega-edge[cpu]"'),
        ({}, "onnxruntime-cuda", 'onnxruntime is not installed; pip install "vega-edge[cuda]"'),
        ({}, "openvino-bf16", 'openvino is not installed; pip install "vega-edge[openvino]"'),
        (
            {"onnxruntime": "cpu"},
            "onnxruntime-cuda",
            'this onnxruntime was built without CUDA; pip uninstall onnxruntime, then pip install "vega-edge[cuda]"',
        ),
        ({"onnxruntime": "cuda"}, "onnxruntime-cuda", f"{NO_DRIVER}; install NVIDIA's driver, or use another engine"),
        (
            {"onnxruntime": "broken"},
            "onnxruntime-cpu",
            "onnxruntime is installed in part: another package took files with it; "
            'pip uninstall every onnxruntime package, then pip install "vega-edge[cpu]"',
        ),
    ],
)
def test_an_engine_that_is_not_there(monkeypatch, tmp_path, graph, packages, name, message):
    found(monkeypatch, tmp_path, **packages)
    monkeypatch.setattr(nvidia.ctypes, "CDLL", no_driver)
    assert refused(engines.open_engine, graph, name) == f"engine {name}: {message}"
    state = next(state for state in engines.available() if state.name == name)
    assert not state.ok
    assert f"{state.why_not}; {state.install}" == message


def test_an_installation_that_does_not_import(monkeypatch, tmp_path, graph):
    found(monkeypatch, tmp_path, onnxruntime="cpu")

    def fail(name, package):
        raise ImportError("DLL load failed while importing onnxruntime_pybind11_state\nmore")

    monkeypatch.setattr(engines, "import_module", fail)
    monkeypatch.setattr(status, "import_module", fail)
    why = "DLL load failed while importing onnxruntime_pybind11_state"
    message = refused(engines.open_engine, graph, "onnxruntime-cpu")
    assert message == f"engine onnxruntime-cpu: onnxruntime can't be imported: {why}"
    cure = 'pip install "vega-edge[cpu]"'
    assert engines.available()[0] == engines.EngineStatus("onnxruntime-cpu", False, why_not=why, install=cure)


def test_the_gpus_are_the_device_of_cuda(monkeypatch, tmp_path):
    found(monkeypatch, tmp_path, onnxruntime="cuda")
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: Driver(["RTX 4090", "RTX 3060"]))
    module = SimpleNamespace(device=lambda provider: "GPU", version=lambda provider: "1.31.1")
    monkeypatch.setattr(status, "import_module", lambda name, package: module)
    state = engines.EngineStatus("onnxruntime-cuda", True, "1.31.1", "RTX 4090, RTX 3060")
    assert state in engines.available()


def test_tensorrt_rtx_does_not_ask_for_tensorrt(monkeypatch, tmp_path, graph):
    """They share a file here, and usually one of them is installed."""
    from vega_edge.engines import tensorrt

    found(monkeypatch, tmp_path, tensorrt_rtx="cpu")
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: Driver(["RTX 4090"]))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it fails
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: "sm_89")
    monkeypatch.setattr(tensorrt, "load_runtime", lambda extra: None)
    assert engines.EngineStatus("tensorrt-rtx", True, "1.7", "RTX 4090") in engines.available()
    told = []

    def open_graph(path, module, how):
        told.append((module, how.cache.parent.name))
        return SimpleNamespace(inputs={}, outputs={}, close=lambda: None)

    monkeypatch.setattr(tensorrt, "open_graph", open_graph)
    engines.open_engine(graph, "tensorrt-rtx", cache=tmp_path / "cache")
    assert told == [("tensorrt_rtx", "tensorrt-rtx-1.7")]


def test_auto_never_loses_precision():
    assert set(engines.ENGINES) - set(choice.AUTO) == {"openvino-bf16", "onnxruntime-tensorrt"}


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (Driver([]), "the NVIDIA driver shows no GPU"),
        (Driver([], code=100), "the NVIDIA driver shows no GPU"),
        (Driver(["x"], code=803), "the NVIDIA driver does not work (CUDA error 803)"),
    ],
)
def test_a_driver_without_gpus(monkeypatch, driver, message):
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: driver)
    assert refused(nvidia.devices) == message


def test_names_of_gpus(monkeypatch):
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: Driver(["NVIDIA RTX A2000", None]))
    assert nvidia.devices() == ["NVIDIA RTX A2000", "GPU 1"]
    assert ctypes.sizeof(ctypes.c_int) == 4  # CUdevice


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one", "one"),
        ("\n first \nsecond\n", "first"),
        ("", "MemoryError"),
        ("Exception from src/core.cpp:132:\nCheck 'x' failed at y.cpp:1:\nwhat it is\n\n\n", "what it is"),
        ("Check 'false' failed at z.cpp:47:\nLoading\nno data\n", "no data"),
    ],
)
def test_reason(text, line):
    assert checked.reason(MemoryError(text)) == line


def test_a_small_model_is_not_compiled(monkeypatch, tmp_path, caplog):
    found(monkeypatch, tmp_path, onnxruntime="cpu", openvino="cpu")
    with caplog.at_level(logging.INFO):
        assert engines.choose_engine(10_000_000) == "onnxruntime-cpu"
    assert "openvino (it would compile for longer than a model this small takes to run)" in caplog.text
    assert engines.choose_engine(1_000_000_000) == "openvino"


def test_a_small_model_runs_on_openvino_where_that_is_all_there_is(monkeypatch, tmp_path):
    found(monkeypatch, tmp_path, openvino="cpu")
    assert engines.choose_engine(10_000_000) == "openvino"


def test_auto_passes_over_what_the_precision_does_not_run_on(monkeypatch, tmp_path, caplog):
    """onnxruntime has no bf16 convolution on a CPU; so a small model of it is not kept from OpenVINO either."""
    found(monkeypatch, tmp_path, onnxruntime="cpu", openvino="cpu")
    assert engines.choose_engine(10_000_000, precision=("bf16", "bf16")) == "openvino"
    assert engines.choose_engine(10_000_000, precision=("fp16", "fp16")) == "onnxruntime-cpu"
    found(monkeypatch, tmp_path, onnxruntime="cpu")
    assert refused(engines.choose_engine, None, None, "cpu", ("bf16", "bf16")).endswith(
        "; openvino (openvino is not installed); onnxruntime-cpu (onnxruntime has no bf16 convolution on a CPU); "
        'pip install "vega-edge[cpu]"'
    )


@pytest.mark.parametrize(
    "failure", [OSError("libnvinfer.so.10: cannot open shared object file"), RuntimeError("in part")]
)
def test_auto_passes_over_a_library_that_is_installed_in_part(monkeypatch, tmp_path, failure):
    from vega_edge.engines import tensorrt

    def fail(module):
        raise failure

    found(monkeypatch, tmp_path, tensorrt="cpu", onnxruntime="cpu")
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: Driver(["RTX 4090"]))
    monkeypatch.setattr(tensorrt, "import_module", fail)
    name, passed = engines.best_engine()
    assert (name, passed[1]) == ("onnxruntime-cpu", f"tensorrt ({failure})")


@pytest.mark.parametrize(
    ("name", "jetson", "extra"),
    [("tensorrt-rtx", False, "tensorrt-rtx"), ("tensorrt", False, "tensorrt"), ("tensorrt", True, "jetson")],
)
def test_doctor_says_what_brings_cuda_python(monkeypatch, tmp_path, name, jetson, extra):

    package = name.replace("-", "_")
    found(monkeypatch, tmp_path, **{package: "cpu"})
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda library: Driver(["RTX 4090"]))
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(__version__="1.7"))
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    (tmp_path / "release").touch()
    monkeypatch.setattr(nvidia, "JETSON", tmp_path / ("release" if jetson else "none"))
    state = next(state for state in engines.available() if state.name == name)
    assert not state.ok
    assert state.why_not.startswith("cuda-python can't be imported (")
    assert state.why_not.endswith(f'); pip install "vega-edge[{extra}]"')
    assert engines.best_engine()[1][("tensorrt-rtx", "tensorrt").index(name)] == f"{name} ({state.why_not})"
