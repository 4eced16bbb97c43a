"""Engines: "run this ONNX file on that device". Knows no diffusion; a backend is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import CheckpointError, EngineError, UsageError
from ..onnx_file import numpy_dtype, read_weights
from . import compiled
from .checked import CheckedEngine, reason
from .choice import (
    ENGINES,
    SMALL_BYTES,
    best_engine,
    built_shapes,
    can_run,
    check_engine,
    choose_engine,
    gpu_index,
    missing_here,
    runs_on_cpu,
    takes_attention_form,
    tiles_attention,
)
from .dtypes import check_dtype
from .library_calls import library_calls
from .plan_choice import BuiltFor, built_graphs
from .protocol import Engine, LazyWeights, Opening, Spec, describe
from .status import EngineStatus, available

__all__ = [
    "ENGINES",
    "SMALL_BYTES",
    "BuiltFor",
    "Engine",
    "EngineStatus",
    "LazyWeights",
    "Spec",
    "available",
    "best_engine",
    "built_graphs",
    "built_shapes",
    "can_run",
    "check_dtype",
    "check_engine",
    "check_graph",
    "choose_engine",
    "gpu_index",
    "library_calls",
    "missing_here",
    "open_engine",
    "runs_on_cpu",
    "takes_attention_form",
    "tiles_attention",
]


def open_engine(
    path: Path,
    engine: str = "auto",
    *,
    threads: int = 0,
    cache: Path | None = None,
    identity: str = "",
    weights: Mapping[str, NDArray[Any]] | None = None,
    low_memory: bool = False,
    device: str | None = None,
    cache_needs: int = 0,
) -> Engine:
    """Opens the ONNX graph at `path` on `engine`, one of ENGINES or "auto". Options not told of here: see `Opening`.

    `cache`: a folder where backends may keep what they compiled, each graph in a folder of its own. `identity`: a text
    that changes whenever the graph, its weights or the replaced ones do; without it the files are read to find out.
    `device`: cpu, cuda or cuda:N, and must be one that the engine runs on; None for the CPU, or the first GPU.
    Raises UsageError for an unknown engine, EngineError if it is missing or can't open the graph.
    """
    if engine == "auto":
        engine = choose_engine(device=device)
    if threads < 0:
        raise UsageError(f"threads must be 0 (the engine decides) or more, not {threads}")
    check_engine(engine, device)
    if not path.is_file():
        raise EngineError(f"engine {engine} can't open {path}: there is no such file")
    if isinstance(weights, LazyWeights):
        given = weights
        weights = LazyWeights(lambda: _checked(path, given), given.loras)
    else:
        weights = _checked(path, weights or {})
    backend = ENGINES[engine]
    try:
        module = import_module(f".{backend.module}", __package__)
    except ImportError as failure:
        raise EngineError(f"engine {engine}: {backend.package} can't be imported: {reason(failure)}") from failure
    try:
        kept = cache and compiled.entry(
            cache, engine, module.version(backend.setting), identity or compiled.identity_of(path, weights)
        )
        how = Opening(threads, kept, weights, low_memory, gpu_index(device), cache_needs)
        with library_calls:
            opened: Engine = module.open_graph(path, backend.setting, how)
    except CheckpointError:  # of weights that are made only now
        raise
    except Exception as failure:
        raise EngineError(f"engine {engine} can't open {path}: {reason(failure)}") from failure
    checked = CheckedEngine(opened, engine, path)
    if cache is not None:
        compiled.opened(checked, kept)
        compiled.trim(cache, compiled.most_bytes(cache, cache_needs), keep=kept)
    return checked


def check_graph(path: Path, engine: str) -> None:
    """Raises EngineError if `engine`, one that runs on the CPU, can't open the graph at `path`. Takes less time and memory
    than `open_engine`, because nothing is made of the weights: at most one copy of them is held."""
    backend = ENGINES[engine]
    try:
        import_module(f".{backend.module}", __package__).check_graph(path, backend.setting)
    except Exception as failure:
        raise EngineError(f"engine {engine} can't open {path}: {reason(failure)}") from failure


def _checked(path: Path, weights: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """`weights`. Backends differ in what they say, or do, about an initializer that is not there or of another shape."""
    places = read_weights(path) if weights else {}
    for name, array in weights.items():
        if name not in places:
            raise EngineError(f"{path} has no initializer {name!r} whose values could be replaced")
        want = numpy_dtype(places[name].dtype)
        if (array.dtype, array.shape) != (want, places[name].shape) or not array.flags.c_contiguous:
            expected = describe(want, places[name].shape)
            raise EngineError(f"{path}: initializer {name!r} is {expected}, got {describe(array.dtype, array.shape)}")
    return weights
