"""Engines: "run this ONNX file on that device". Knows no diffusion; a backend is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..errors import EngineError, UsageError, unknown
from .checked import CheckedEngine, reason
from .choice import ENGINES, choose_engine, missing_here
from .protocol import Engine, Spec
from .status import EngineStatus, available

__all__ = ["ENGINES", "Engine", "EngineStatus", "Spec", "available", "choose_engine", "open_engine"]


def open_engine(path: Path, engine: str = "auto", *, threads: int = 0, cache: Path | None = None) -> Engine:
    """Opens the ONNX graph at `path` on `engine`, one of ENGINES or "auto".

    `threads`: of the CPU; 0 leaves the number to the backend. `cache`: a folder where a backend that compiles may keep
    what it compiled. Raises UsageError for an unknown engine, EngineError if it is missing or can't open the graph.
    """
    if engine == "auto":
        engine = choose_engine()
    if engine not in ENGINES:
        raise unknown("engine", engine, ["auto", *ENGINES])
    if threads < 0:
        raise UsageError(f"threads must be 0 (the engine decides) or more, not {threads}")
    if missing := missing_here(engine):
        raise EngineError(f"engine {engine}: {missing.why}; {missing.cure}")
    if not path.is_file():
        raise EngineError(f"engine {engine} can't open {path}: there is no such file")
    backend = ENGINES[engine]
    try:
        module = import_module(f".{backend.package}", __package__)
    except ImportError as failure:
        raise EngineError(f"engine {engine}: {backend.package} can't be imported: {reason(failure)}") from failure
    try:
        opened: Engine = module.open_graph(path, backend.setting, threads, cache)
    except Exception as failure:
        raise EngineError(f"engine {engine} can't open {path}: {reason(failure)}") from failure
    return CheckedEngine(opened, engine, path)
