"""Graphs on onnxruntime's CUDA or TensorRT provider: values stay on the GPU, and a shape that comes again is replayed.

Outputs and inputs of a shape keep their place on the device and are bound once, which is what lets onnxruntime capture a
CUDA graph of it: a graph that is replayed reads and writes the addresses that it was captured with, and does not look at
what is bound. Feeds that can't change are sent once.

onnxruntime captures in CUDA's global mode: until a capture ends, an allocation or a copy by any other thread of the process
fails, and ends the capture too. So sessions on a GPU are opened, run and closed one at a time.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import, unused-ignore]
from numpy.typing import NDArray

from ..errors import EngineError
from ..manifest import MANIFEST, Manifest
from ..onnx_file import read_weights
from . import nvidia
from . import onnxruntime as common
from .compiled import has_room
from .device_io import Held
from .onnxruntime import CUDA
from .protocol import Opening

TENSORRT = "TensorrtExecutionProvider"
_SHAPES = 4  # kept bound at once
_NO_GRAPH = "-1"  # onnxruntime's gpu_graph_id for a run that is not captured
_NO_MEMORY = ("Failed to allocate memory", "out of memory")
_ALONE = threading.RLock()
_log = logging.getLogger(__name__)
version = common.version


@dataclass
class _Bound:
    """One set of shapes: where its values lie on the device, and their binding."""

    inputs: dict[str, Any]
    binding: Any
    graph_id: str = ""  # "": not chosen yet
    outputs: dict[str, Any] = field(default_factory=dict)
    held: Held = field(default_factory=Held)


class BoundEngine:
    """`captures`: the session was opened with CUDA graphs."""

    def __init__(self, session: Any, gpu: int, captures: bool) -> None:
        self._session, self._gpu, self._captures = session, gpu, captures
        self.inputs = {node.name: common._spec(node) for node in session.get_inputs()}
        self.outputs = {node.name: common._spec(node) for node in session.get_outputs()}
        self._bound: OrderedDict[tuple[Any, ...], _Bound] = OrderedDict()
        self.captured: set[str] = set()  # ids of the graphs that onnxruntime holds

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with _ALONE, memory_cure(self._gpu):
            bound = self._ready(feeds)
            self._send(bound, feeds)
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", self._graph_id(bound))
            self._session.run_with_iobinding(bound.binding, options)
            if not bound.outputs:  # the first run found out how large they are; here they stay
                bound.outputs = dict(zip(self.outputs, bound.binding.get_outputs(), strict=True))
                for name, value in bound.outputs.items():
                    bound.binding.bind_ortvalue_output(name, value)
            return {name: value.numpy() for name, value in bound.outputs.items()}

    def close(self) -> None:
        with _ALONE:
            self._bound.clear()
            self._session = None

    def _ready(self, feeds: Mapping[str, NDArray[Any]]) -> _Bound:
        key = tuple((name, feeds[name].shape) for name in self.inputs)
        if key not in self._bound:
            if len(self._bound) >= _SHAPES:
                self._bound.popitem(last=False)
            self._bound[key] = self._bind(feeds)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _graph_id(self, bound: _Bound) -> str:
        """The first run of a shape has none: where its outputs lie is not known yet.

        Never an id that was used before: its graph has other addresses. And onnxruntime keeps every graph until the session
        ends, so that shapes which come again after the first few run without one.
        """
        if not self._captures or not bound.outputs:
            return _NO_GRAPH
        if not bound.graph_id:
            bound.graph_id = str(len(self.captured) + 1) if len(self.captured) < _SHAPES else _NO_GRAPH
            if bound.graph_id != _NO_GRAPH:
                self.captured.add(bound.graph_id)
        return bound.graph_id

    def _bind(self, feeds: Mapping[str, NDArray[Any]]) -> _Bound:
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(feeds[name], "cuda", self._gpu) for name in self.inputs}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cuda", self._gpu)
        return _Bound(inputs, binding)

    def _send(self, bound: _Bound, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Copy what is not on the device yet to where it is bound."""
        sent = bound.held.changed(feeds)
        try:
            for name in sent:
                bound.inputs[name].update_inplace(feeds[name])
        except BaseException:  # such as Ctrl-C in a notebook, which goes on with the same arrays
            for name in sent:
                bound.held.forget(name)
            raise


def open_graph(path: Path, provider: str, how: Opening) -> BoundEngine:
    common._require(CUDA)
    if provider == TENSORRT:
        providers = [(TENSORRT, _tensorrt(path, how)), (CUDA, {"device_id": how.gpu})]
        return BoundEngine(_session(path, how, providers), how.gpu, captures=False)
    settings = {"device_id": how.gpu, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    try:
        session = _session(path, how, [(CUDA, {**settings, "enable_cuda_graph": 1})])
        return BoundEngine(session, how.gpu, captures=True)
    except Exception as failure:
        if "graph capture" not in str(failure):
            raise
        _log.warning("%s/%s runs without a CUDA graph, slower: part of it runs on the CPU", path.parent.name, path.name)
    return BoundEngine(_session(path, how, [(CUDA, settings)]), how.gpu, captures=False)


def device(provider: str) -> str:
    """Raises EngineError if this build of onnxruntime has no such provider, or can't load what it needs."""
    common._require(CUDA)
    common._require(provider)
    for each in dict.fromkeys([provider, CUDA]):  # TensorRT's leaves to CUDA's what it has not
        common.try_provider(each, {})
    return "GPU"


@contextlib.contextmanager
def memory_cure(gpu: int) -> Iterator[None]:
    """Raises EngineError with the cure for what onnxruntime says about memory; anything else passes."""
    try:
        yield
    except Exception as failure:
        text = str(failure)
        if not any(sign in text for sign in _NO_MEMORY):
            raise
        size = re.search(r"buffer of size (\d+)", text)
        raise EngineError(nvidia.no_memory(gpu, int(size[1]) if size else 0)) from failure


def _session(path: Path, how: Opening, providers: list[tuple[str, dict[str, Any]]]) -> Any:
    options = common._options(how)
    # What they save of a GPU's memory has not been measured.
    options.enable_mem_reuse = options.enable_mem_pattern = True
    graph = common._replace_weights(path, options, how.weights)
    # Without enable_fallback=0 a provider that fails is replaced by the CPU, at opening and again in every run.
    with _ALONE, memory_cure(how.gpu):
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    common.check_provider(session, *(name for name, _ in providers))
    return session


def _tensorrt(path: Path, how: Opening) -> dict[str, Any]:
    """Engines and timings are kept, so that the minutes they take are spent once. Half precision is used where the graph
    asks for it: without these switches the provider computes in fp32."""
    dtype = _arithmetic(path)
    settings: dict[str, Any] = {
        "device_id": how.gpu, "trt_fp16_enable": dtype == "fp16", "trt_bf16_enable": dtype == "bf16"
    }  # fmt: skip
    if how.cache is not None and has_room(how.cache, 0):
        how.cache.mkdir(parents=True, exist_ok=True)
        settings |= {
            "trt_engine_cache_enable": True, "trt_engine_cache_path": str(how.cache),
            "trt_timing_cache_enable": True, "trt_timing_cache_path": str(how.cache),
        }  # fmt: skip
    return settings


def _arithmetic(path: Path) -> str:
    """What the graph computes in: fp32, fp16, bf16 or int8, as the bundle's manifest says; without one, as the smallest
    float type of its weights."""
    manifest = path.parent.parent / MANIFEST
    if manifest.is_file():
        told = Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest)
        part = told.parts.get(path.parent.name)
        return str((part and part.dtype) or told.dtype)
    kinds = {weight.dtype for weight in read_weights(path).values()}
    return next((kind for kind in ("fp16", "bf16") if kind in kinds), "fp32")
