"""Graphs on OpenVINO's CPU device, in float32 or bfloat16 arithmetic."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..telemetry import import_openvino
from .compiled import has_room, prepared_bytes, used
from .protocol import Opening, Spec

import_openvino()
import openvino as ov  # type: ignore[import, unused-ignore]  # noqa: E402
from openvino.frontend import FrontEndManager  # type: ignore[import, unused-ignore]  # noqa: E402

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "boolean": np.dtype(np.bool_),
}


class OpenVinoEngine:
    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self.inputs = {port.any_name: _spec(port) for port in compiled.inputs}
        self.outputs = {port.any_name: _spec(port) for port in compiled.outputs}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        # Outputs are in the order of compiled.outputs, and copies, because share_outputs is False.
        results = self._request.infer(dict(feeds), share_outputs=False)
        return {name: results[index] for index, name in enumerate(self.outputs)}

    def close(self) -> None:
        self._request = None


@functools.cache
def core() -> Any:
    """OpenVINO's Core: one for the process, which is never freed.

    A Core's CPU device gives the thread that first uses it another stack for signals, and unmaps that when it is freed,
    unless a later Core's has taken its place: then the next signal is handled on memory that is gone. Nor is it freed at
    Python's end, when a Core of the program's own may have ended before.
    """
    made = ov.Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


def open_graph(path: Path, precision: str, how: Opening) -> OpenVinoEngine:
    """`precision` is f32 or bf16."""
    _require(core(), precision)
    model = _read(path)
    _replace_weights(model, how.weights)
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    # It would round float inputs to 8 bits wherever weights are stored in 8, in groups of 32; see onnxruntime.py.
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if how.threads:
        settings["INFERENCE_NUM_THREADS"] = how.threads
    compiled = _compile(core(), model, settings, how, path)
    got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if got != precision:
        raise EngineError(f"asked for {precision} arithmetic, got {got}")
    return OpenVinoEngine(compiled)


def check_graph(path: Path, precision: str) -> None:
    """Raises what OpenVINO raises for a graph that it can't read. It is not compiled, which takes several times the
    weights' memory; nodes that OpenVINO lacks are refused before that."""
    _read(path)


def _read(path: Path) -> Any:
    # The ONNX frontend itself: core.read_model would try every frontend on a damaged file, and they print.
    # And a model, not a path, to compile_model: by path, the cache does not see a change in the external weights.
    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.convert(frontend.load(path))
    if not model.outputs:  # how OpenVINO reads an empty file
        raise EngineError("the graph has no outputs")
    return model


def _compile(core: Any, model: Any, settings: dict[str, Any], how: Opening, path: Path) -> Any:
    fresh = how.cache is not None and not any(how.cache.glob("*.blob"))
    if how.cache is None or (fresh and not _has_room(how.cache, path, how)):
        return core.compile_model(model, "CPU", settings)
    settings["CACHE_DIR"] = str(how.cache)  # of its own: one shared between precisions once gave NaN
    compiled = core.compile_model(model, "CPU", settings)
    used(how.cache)
    if fresh and how.low_memory:  # read back, its weights are mapped from the file; as compiled they are copies
        del compiled
        compiled = core.compile_model(model, "CPU", settings)
    return compiled


def _has_room(folder: Path, path: Path, how: Opening) -> bool:
    size = prepared_bytes(path)
    return has_room(folder, size, max(size, how.cache_needs) if how.low_memory else 0)


def _replace_weights(model: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    for node in model.get_ops() if weights else ():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name in weights:
            array = weights[name]
            kind = ov.Type.bf16 if array.dtype == np.uint16 else ov.Type(array.dtype)
            tensor = ov.Tensor(array, ov.Shape(list(array.shape)), kind)
            node.output(0).replace(ov.op.Constant(tensor, True).output(0))  # True: the array's memory is shared


def version(precision: str) -> str:
    return str(ov.__version__).split("-")[0]


def device(precision: str) -> str:
    """What `precision` runs on, for people. Raises EngineError if this CPU does not have that precision."""
    _require(core(), precision)
    return str(core().get_property("CPU", "FULL_DEVICE_NAME"))


def _require(core: Any, precision: str) -> None:
    """Asked for bf16 on a CPU that lacks it, OpenVINO computes in float32 without a word."""
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        cpu = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise EngineError(f"this CPU ({cpu}) has no bf16 arithmetic; use openvino")


def _spec(port: Any) -> Spec:
    kind = port.element_type.get_type_name()
    if kind not in DTYPES:
        raise EngineError(f"{port.any_name!r} is {kind}, which is not among: {', '.join(DTYPES)}")
    shape = port.partial_shape
    return Spec(DTYPES[kind], tuple(None if size.is_dynamic else size.get_length() for size in shape))
