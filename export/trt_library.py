"""TensorRT and TensorRT-RTX as one: which is installed, what it can build for, and what its errors mean.

Their Python APIs are almost the same. TensorRT-RTX builds without a GPU, for many; TensorRT builds on a GPU, for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from ..engines import nvidia
from ..engines.choice import install_line
from ..errors import EngineError, UsageError, unknown

AMPERE_PLUS = "ampere+"
TURING = "sm_75"
PRECISIONS = ("graph", "int8", "fp8")


class Library(NamedTuple):
    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def portable(self) -> bool:
        """Builds for GPUs that are not here."""
        return self.name == "tensorrt-rtx"


def load_library(name: str) -> Library:
    """ "tensorrt-rtx" or "tensorrt"; EngineError says how to install it."""
    libraries = ("tensorrt-rtx", "tensorrt")
    if name not in libraries:
        raise unknown("engine to build", name, libraries)
    try:
        module = import_module(name.replace("-", "_"))
    except ModuleNotFoundError as failure:
        raise EngineError(f"{name} is not installed here; {install_line(name)}") from failure
    except (ImportError, OSError, RuntimeError) as failure:  # its own libraries are missing
        raise EngineError(f"{name} is installed but can't be imported: {failure}") from failure
    return Library(name, module)


def check_targets(library: Library, targets: tuple[str, ...], precision: str, gpu: int = 0) -> tuple[str, ...]:
    """The targets to build for, given those asked for (none: the default), on GPU `gpu`. UsageError for what can't be."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if not library.portable:
        here = nvidia.compute_capability(gpu)
        if targets not in ((), (here,)):
            raise UsageError(f"{library.name} builds for the GPU it runs on, {here}, not for {', '.join(targets)}")
        if precision == "fp8" and not _has_fp8(here):
            raise UsageError(f"fp8 needs sm_89 or later, and this GPU is {here}; use int8")
        return (here,)
    known = [AMPERE_PLUS, *_capabilities(library)]
    for target in targets:
        if target not in known:
            raise unknown("target", target, known)
    targets = tuple(sorted({*targets}, key=known.index)) or (AMPERE_PLUS,)  # in whatever order they were named
    if len(targets) > 1 and set(targets) & {AMPERE_PLUS, TURING}:
        raise UsageError(
            f"{AMPERE_PLUS} and {TURING} are each an engine of its own, not to be mixed with others: build one after "
            "the other"
        )
    if precision == "int8" and TURING in targets:  # NVIDIA's support matrix of TensorRT-RTX, 1.0 to 1.5
        raise UsageError(f"{library.name} has no int8 for {TURING} (Turing): build without --precision")
    if precision == "fp8" and (refused := [target for target in targets if not _has_fp8(target)]):
        able = ", ".join(filter(_has_fp8, known))
        raise UsageError(f"fp8 needs {able}; {', '.join(refused)} has none: name targets, or use int8")
    return targets


def _has_fp8(target: str) -> bool:
    return target != AMPERE_PLUS and nvidia.has_fp8(target)


def set_targets(library: Library, config: Any, targets: tuple[str, ...]) -> None:
    """Nothing set is TensorRT-RTX's default: every RTX GPU from Ampere on, also ones not yet made, by compiling there."""
    if not library.portable or targets == (AMPERE_PLUS,):
        return
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(_capabilities(library)[target], i)


def _capabilities(library: Library) -> dict[str, Any]:
    members = library.module.ComputeCapability.__members__
    return {f"sm_{name[2:]}": value for name, value in members.items() if name.startswith("SM")}


def cure(messages: list[str], targets: tuple[str, ...]) -> str:
    """What to do about the errors that the library logged, or ''."""
    text = " ".join(messages)
    lowered = text.lower()
    if "FP32 GEMM is not supported" in text:
        return f"{TURING} has no fp32 matrix product in TensorRT-RTX: export the bundle with --dtype fp16"
    if "cudaError" in text or "CUDA_SUCCESS" in text or "CUDA initialization" in text:
        return "this kind of build needs a GPU with a new enough driver: see vega-edge doctor, or build without --refit and --stripped"
    if "out of memory" in lowered or "outofmemory" in lowered or "bad_alloc" in lowered or "MEM_ALLOC" in text:
        return "too little memory: lower MIN:BEST:MAX of --size and --batch, build one --part at a time, or close other programs"
    if "HW-specific datatypes" in text:
        return f"{', '.join(targets)} lacks a type of this graph: name other targets with --target"
    return "see -v for all that the library said"
