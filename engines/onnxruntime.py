"""Graphs on onnxruntime: its CPU provider or its CUDA provider, exactly the one that was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import, unused-ignore]
from numpy.typing import NDArray

from ..errors import EngineError
from .protocol import Spec

CUDA = "CUDAExecutionProvider"

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
    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = {node.name: _spec(node) for node in session.get_inputs()}
        self.outputs = {node.name: _spec(node) for node in session.get_outputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = list(self.outputs)
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def close(self) -> None:
        self._session = None


def open_graph(path: Path, provider: str, threads: int, cache: Path | None) -> OnnxRuntimeEngine:
    """`threads` 0 is one for each physical core. `cache` is not used: onnxruntime compiles nothing on a CPU."""
    _require(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # at 3 it prints each failure in colour and then raises the same text
    # It would round float inputs to 8 bits wherever weights are stored in 8; only graphs that say so are integer.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Without enable_fallback=0 a provider that fails is replaced by the CPU, at opening and again in every run.
    session = ort.InferenceSession(path, options, providers=[provider], enable_fallback=0)
    got = session.get_providers()
    if got[0] != provider:
        raise EngineError(f"asked for {provider}, got {got[0]}")
    return OnnxRuntimeEngine(session)


def version() -> str:
    return str(ort.__version__)


def device(provider: str) -> str:
    """What `provider` runs on, for people. Raises EngineError if this build of onnxruntime has no such provider."""
    _require(provider)
    return "GPU" if provider == CUDA else "CPU"


def _require(provider: str) -> None:
    if provider == CUDA and hasattr(ort, "preload_dlls"):
        # Finds the CUDA libraries of the nvidia-* packages; it reports on stdout, which is for data.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    offered = ort.get_available_providers()
    if provider not in offered:
        raise EngineError(f"onnxruntime {ort.__version__} has no {provider}; it has: {', '.join(offered)}")


def _spec(node: Any) -> Spec:
    if node.type not in DTYPES:
        raise EngineError(f"{node.name!r} is {node.type}, which is not among: {', '.join(DTYPES)}")
    return Spec(DTYPES[node.type], tuple(node.shape))
