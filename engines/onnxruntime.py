"""Graphs on onnxruntime: its CPU provider or its CUDA provider, exactly the one that was asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import, unused-ignore]
from numpy.typing import NDArray

from ..errors import EngineError
from ..onnx_file import read_weights
from .compiled import has_room, making, prepared_bytes, used
from .protocol import Opening, Spec

CUDA = "CUDAExecutionProvider"
# y = -x, float32[1], opset 18: what a provider must be able to open
_ONE_NODE = (
    b'\x08\x08:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)
BFLOAT16 = 16  # TensorProto.DataType
# How an optimized graph is saved: keys of onnxruntime_session_options_config_keys.h
_SAVED = {
    "optimized_model_external_initializers_file_name": "weights",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
}

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


class OnnxRuntimeEngine:
    """A session as an Engine. arena: whether the session takes its memory from onnxruntime's own allocator, its default."""

    def __init__(self, session: Any, arena: bool = True) -> None:
        self._session = session
        self.inputs = {node.name: _spec(node) for node in session.get_inputs()}
        self.outputs = {node.name: _spec(node) for node in session.get_outputs()}
        self._options = ort.RunOptions()
        # A session keeps what a run took for the next one. Networks run in turn, so together they would hold the sum of
        # their peaks; given back after each run it is the largest of them.
        if arena:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = list(self.outputs)
        return dict(zip(names, self._session.run(names, feeds, self._options), strict=True))

    def close(self) -> None:
        self._session = None


def open_graph(path: Path, provider: str, how: Opening) -> OnnxRuntimeEngine:
    """With `how.low_memory` and a cache the CPU provider opens what it made of the graph before; see `_prepare`."""
    _require(provider)
    if how.low_memory and how.cache is not None and provider != CUDA:
        options = _options(how)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done before
        # Kernels would copy their weights into a layout of their own: a third faster, and once more the weights. Copies
        # saved with the graph (session.save_external_prepacked_...) end in a crash when 1.31 reads a text encoder's.
        options.add_session_config_entry("session.disable_prepacking", "1")
        prepared = _prepare(path, provider, how, how.cache)
        try:
            return OnnxRuntimeEngine(_session(prepared, provider, options))
        except Exception:
            if prepared.is_file():
                raise
            # another process made room in the cache meanwhile
            return OnnxRuntimeEngine(_session(_prepare(path, provider, how, how.cache), provider, options))
    options = _options(how)
    return OnnxRuntimeEngine(_session(_replace_weights(path, options, how.weights), provider, options))


def check_graph(path: Path, provider: str) -> None:
    """Raises what onnxruntime raises for a graph that it can't open. It is rewritten as it is for users, except that no
    weight is folded into another form or copied into a kernel's own layout: those steps take several times the weights'
    memory, and what they change is no operator."""
    options = _options(Opening(threads=1))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # all but layouts
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(
        path, options, providers=[provider], enable_fallback=0, disabled_optimizers=["ConstantFolding"]
    )


def _options(how: Opening) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = how.threads  # 0 is one for each physical core
    options.log_severity_level = 4  # at 3 it prints each failure in colour and then raises the same text
    # Planning who takes whose buffer compares every value with all that were freed before, and where sizes are symbols
    # hardly finds any: most of the time it took to open a U-Net of 2,000 nodes, for 3 % of the memory of a decoder.
    options.enable_mem_reuse = False
    # From a shape's second run on, one block for all values beside what the first run took: twice the memory of a decoder.
    options.enable_mem_pattern = False
    # It would round float inputs to 8 bits wherever weights are stored in 8; only graphs that say so are integer.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def _session(graph: Path | bytes, provider: str, options: Any) -> Any:
    # Without enable_fallback=0 a provider that fails is replaced by the CPU, at opening and again in every run.
    session = ort.InferenceSession(graph, options, providers=[provider], enable_fallback=0)
    check_provider(session, provider)
    return session


def check_provider(session: Any, *providers: str) -> None:
    """onnxruntime opens a graph on the CPU, with a warning only, where a provider's libraries can't be loaded: also what
    one provider leaves to the next."""
    got = session.get_providers()
    missing = [provider for provider in providers if provider not in got]
    if not missing:
        return
    libraries, cure = "CUDA's or cuDNN's", 'pip install "vega-edge[cuda]" brings them'
    if missing[0].startswith("Tensorrt"):
        libraries, cure = "TensorRT's", "install TensorRT from NVIDIA, or use onnxruntime-cuda"
    raise EngineError(
        f"asked for {missing[0]}, got {', '.join(got)}: {libraries} libraries are missing, or are not of the version that "
        f"onnxruntime {ort.__version__} wants; {cure}"
    )


def try_provider(provider: str, settings: dict[str, Any]) -> None:
    """Opens one node with `provider`. Raises EngineError, or what onnxruntime raises, if that can't be done."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    check_provider(
        ort.InferenceSession(_ONE_NODE, options, providers=[(provider, settings)], enable_fallback=0), provider
    )


def _prepare(path: Path, provider: str, how: Opening, folder: Path) -> Path:
    """The graph as onnxruntime optimizes it, its weights in the precision that it computes in, in `folder`.

    Opened from there, weights are mapped from the file: memory that the system can take back and read again, where an
    ordinary session holds copies of its own. On disk it is as large as the weights are in that precision.
    """
    done = folder / path.name
    used(folder)  # before it is looked at, so that no other process finds it the oldest meanwhile
    if not done.is_file():
        size = prepared_bytes(path)
        has_room(folder, size, needed=max(size, how.cache_needs))
        with making(folder) as part:
            options = _options(how)
            graph = _replace_weights(path, options, how.weights)
            options.optimized_model_filepath = str(part / path.name)
            for key, value in _SAVED.items():
                options.add_session_config_entry(f"session.{key}", value)
            _session(graph, provider, options)
    return done


def _replace_weights(path: Path, options: Any, weights: Mapping[str, NDArray[Any]]) -> Path | bytes:
    """What to open so that it has these weights. Not `options.add_initializer`: its values come after constants were folded, so
    that a Cast of a half-precision weight would still give the file's.
    """
    if not weights:
        return path
    places = read_weights(path)
    outside = [name for name in weights if places[name].external]
    if outside:
        options.add_external_initializers(outside, [_value(weights[name]) for name in outside])
    if len(outside) == len(weights):
        return path
    graph = bytearray(path.read_bytes())  # small weights lie in the graph itself
    for name in weights.keys() - outside:
        data, at = weights[name].tobytes(), places[name].offset
        graph[at : at + len(data)] = data
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return bytes(graph)


def _value(array: NDArray[Any]) -> Any:
    """Shares the array's memory."""
    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def version(provider: str) -> str:
    return str(ort.__version__)


def device(provider: str) -> str:
    """What `provider` runs on, for people. Raises EngineError if this build of onnxruntime has no such provider."""
    _require(provider)
    return "GPU" if provider == CUDA else "CPU"


def _require(provider: str) -> None:
    if provider == CUDA and hasattr(ort, "preload_dlls"):
        _load_cuda()
    offered = ort.get_available_providers()
    if provider not in offered:
        raise EngineError(f"onnxruntime {ort.__version__} has no {provider}; it has: {', '.join(offered)}")


def _load_cuda() -> None:
    """Load CUDA's and cuDNN's libraries from the nvidia-* packages.

    `preload_dlls` looks for those packages beside onnxruntime alone, and they may lie in another folder of sys.path, such
    as the system's site-packages below a virtual environment. It reports on stdout, which is for data.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # each folder lacks what another one has
        for folder in _nvidia_folders():
            ort.preload_dlls(directory=str(folder))
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls()


def _nvidia_folders() -> list[Path]:
    """Return the folders of libraries of the nvidia-* packages that do not lie beside onnxruntime."""
    found = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (found and found.submodule_search_locations) or ()]
    beside = Path(ort.__file__).parent.with_name("nvidia")
    patterns = ("*/bin", "*/bin/*") if sys.platform == "win32" else ("*/lib",)
    return [
        folder
        for place in places
        if place != beside
        for pattern in patterns
        for folder in sorted(place.glob(pattern))
        if folder.is_dir()
    ]


def _spec(node: Any) -> Spec:
    if node.type not in DTYPES:
        raise EngineError(f"{node.name!r} is {node.type}, which is not among: {', '.join(DTYPES)}")
    return Spec(DTYPES[node.type], tuple(node.shape))
