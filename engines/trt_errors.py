"""What TensorRT and TensorRT-RTX say when they fail, and what to do about it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


def why(said: list[str]) -> str:
    return said[-1] if said else "the library gave no reason"


def parser_errors(parser: Any) -> list[str]:
    """Those of an ONNX parser or refitter, which some versions log and some only keep."""
    return [" ".join(parser.get_error(i).desc().split()) for i in range(parser.num_errors)]


def diagnose(trt: Any, runtime: Any, plan: bytes | memoryview) -> Set[str]:
    """Names of TensorRT-RTX's `EngineInvalidityDiagnostics` for a plan here; none where the library has no such thing.

    Of a plan that failed only: some plans that do load and run are called invalid too.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return frozenset()
    _, bits = runtime.get_engine_validity(plan)
    members = trt.EngineInvalidityDiagnostics.__members__
    return {name for name, member in members.items() if int(bits) & int(member.value)}


def not_usable(said: list[str], found: Set[str], memory: tuple[int, int], capability: str) -> str:
    """Why a plan whose hash was right could not be loaded or run, and the cure.

    found: by `diagnose`; else the words that were `said` tell. memory: bytes free and in all of the
    GPU, which is a `capability`, 'sm_89'.
    """
    free, total = memory
    text = " ".join(said).lower()
    if "OLD_CUDA_DRIVER" in found:
        return "the NVIDIA driver is too old for it; update the driver"
    if "UNSUPPORTED_CC" in found:
        return f"it was not built for this GPU, {capability}; build it with vega-edge build --target {capability}"
    if "INSUFFICIENT_GPU_MEMORY" in found or "memory" in text:
        return (
            f"the GPU has {free / 1e9:.1f} of {total / 1e9:.1f} GB free, too little for it; close what else uses it (see "
            "nvidia-smi), or use --memory low"
        )
    if "driver" in text:
        return f"{why(said)}; update the NVIDIA driver"
    return f"{why(said)}; build it again with vega-edge build"
