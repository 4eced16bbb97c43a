"""Graphs on onnxruntime's CUDA or TensorRT provider: values stay on the GPU, and a shape that comes again is replayed.

Outputs and inputs of a shape keep their place on the device (IO binding), which is what lets onnxruntime capture a CUDA
graph of it. Feeds that can't change are sent once.
"""

from __future__ import annotations

import contextlib
import logging
import re
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
_log = logging.getLogger(__name__)
version = common.version


@dataclass
class _Bound:
    """One set of shapes: where its values lie on the device."""

    graph_id: str
    inputs: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    held: Held = field(default_factory=Held)


class BoundEngine:
    """`captures`: the session was opened with CUDA graphs."""

    def __init__(self, session: Any, gpu: int, captures: bool) -> None:
        self._session, self._gpu, self._captures = session, gpu, captures
        self.inputs = {node.name: common._spec(node) for node in session.get_inputs()}
        self.outputs = {node.name: common._spec(node) for node in session.get_outputs()}
        self._bound: OrderedDict[tuple[Any, ...], _Bound] = OrderedDict()
        self._count = 0

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        bound = self._ready(feeds)
        for name in bound.held.changed(feeds):
            bound.inputs[name].update_inplace(feeds[name])
        binding, options = self._session.io_binding(), ort.RunOptions()
        for name, value in bound.inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if bound.outputs:
                binding.bind_ortvalue_output(name, bound.outputs[name])
            else:  # the first run finds out how large they are, and where they lie from then on
                binding.bind_output(name, "cuda", self._gpu)
        captured = self._captures and bool(bound.outputs)
        options.add_run_config_entry("gpu_graph_id", bound.graph_id if captured else _NO_GRAPH)
        with memory_cure(self._gpu):
            self._session.run_with_iobinding(binding, options)
        if not bound.outputs:
            bound.outputs = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {name: value.numpy() for name, value in bound.outputs.items()}

    def close(self) -> None:
        self._bound.clear()
        self._session = None

    def _ready(self, feeds: Mapping[str, NDArray[Any]]) -> _Bound:
        key = tuple((name, feeds[name].shape) for name in self.inputs)
        if key not in self._bound:
            if len(self._bound) >= _SHAPES:
                self._bound.popitem(last=False)
            self._count += 1
            # Never an id that was used before: its graph has other addresses. And onnxruntime keeps every graph until the
            # session ends, so that shapes which come after the first few run without one.
            graph_id = str(self._count) if self._count <= _SHAPES else _NO_GRAPH
            with memory_cure(self._gpu):
                values = {n: ort.OrtValue.ortvalue_from_numpy(a, "cuda", self._gpu) for n, a in feeds.items()}
            self._bound[key] = _Bound(graph_id, values)
        self._bound.move_to_end(key)
        return self._bound[key]


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
    options.enable_mem_reuse = options.enable_mem_pattern = (
        True  # what they save of a GPU's memory has not been measured
    )
    graph = common._replace_weights(path, options, how.weights)
    # Without enable_fallback=0 a provider that fails is replaced by the CPU, at opening and again in every run.
    with memory_cure(how.gpu):
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
