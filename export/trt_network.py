"""One graph to one plan: parse, set profile, targets and flags, build; with progress.

The network is strongly typed: the precision of every operation is the graph's. Knows no bundle and no files but the
graph's own.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.cuda import select
from ..engines.trt_logger import alone
from ..engines.trt_logger import logger as trt_logger
from ..errors import BundleError, EngineError
from ..onnx_file import read_weights
from ..whole_file import writing
from .trt_library import Library, cure, set_targets

Progress = Callable[[float, str], None]  # (share done, 0 to 1; phase)
Profile = Mapping[str, tuple[tuple[int, ...], ...]]
_log = logging.getLogger(__name__)


@dataclass
class Job:
    """What to build of one graph. `profile`: (least, best, most) shape of each input with a free axis."""

    library: Library
    graph: Path
    profile: Profile = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    timing_cache: bytes = b""
    gpu: int = 0  # to build on, in CUDA's order
    workspace_bytes: int = 0  # what kernels that are tried may take at most; 0 leaves it to the library
    said: list[str] = field(default_factory=list)  # errors that the library logged


@dataclass(frozen=True)
class BuiltPlan:
    content: memoryview
    timing_cache: bytes


def read_inputs(library: Library, graph: Path) -> dict[str, tuple[int, ...]]:
    """The graph's inputs with their shapes; -1 is a free axis. EngineError for a graph that can't be parsed."""
    with alone():
        return _read_inputs(Job(library, graph))


def _read_inputs(job: Job) -> dict[str, tuple[int, ...]]:
    builder, network, parser = _parse(job)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    del parser, network, builder  # in this order: each refers to the next
    return shapes


def build_to(job: Job, plan: Path, progress: Progress = lambda share, phase: None) -> bytes:
    """`build_plan`, into the file `plan`; gives the timing cache. EngineError where it can't be written, too."""
    built = build_plan(job, progress)
    try:
        with writing(plan) as stream:
            stream.write(built.content)
    except OSError as failure:
        raise EngineError(f"{plan} can't be written ({failure.strerror}); free some space there") from failure
    return built.timing_cache


def build_plan(job: Job, progress: Progress = lambda share, phase: None) -> BuiltPlan:
    """Raises EngineError that says which node or what memory. Ctrl-C is heard when it is done: see trt_child.py."""
    if job.gpu:
        select(job.gpu)
    with alone():
        return _build_plan(job, progress)


def _build_plan(job: Job, progress: Progress) -> BuiltPlan:
    trt = job.library.module
    builder, network, parser = _parse(job)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(job.library, progress)
    for name in builder_flags(trt, job.flags):
        config.set_flag(getattr(trt.BuilderFlag, name))
    resizing = getattr(getattr(trt, "PreviewFeature", None), "RUNTIME_ACTIVATION_RESIZE_10_10", None)
    if resizing is not None:  # contexts then take memory for their own shape, not for the largest
        config.set_preview_feature(resizing, True)
    if job.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    set_targets(job.library, config, job.targets)
    cache = _timing_cache(job, config)
    if job.profile:
        optimization = builder.create_optimization_profile()
        for name, (least, best, most) in job.profile.items():
            optimization.set_shape(name, least, best, most)
        if config.add_optimization_profile(optimization) < 0:
            shapes = "; ".join(f"{name} {least} to {most}" for name, (least, _, most) in job.profile.items())
            why = job.said[-1] if job.said else "no reason given"
            raise EngineError(f"{where(job)}: {job.library.name} refuses the shapes {shapes}: {why}")
    try:
        plan = builder.build_serialized_network(network, config)
    except MemoryError as failure:
        raise EngineError(f"{where(job)}: out of memory; {cure(['out of memory'], job.targets)}") from failure
    if plan is None:
        why = job.said[-1] if job.said else "no reason given"
        raise EngineError(f"{where(job)}: {job.library.name} can't build it: {why}; {cure(job.said, job.targets)}")
    del parser  # the network reads its weights until here
    return BuiltPlan(memoryview(plan), bytes(memoryview(cache.serialize())) if cache is not None else b"")


def builder_flags(trt: Any, flags: tuple[str, ...]) -> list[str]:
    """The library's names. A stripped plan gets back the weights that it was built with, and is as fast as one that has
    them, unless it is to take others too."""
    found = {"REFIT"} if "refit" in flags else set()
    # TensorRT-RTX 1.2's release notes: CUDA stream capture needs it; its builder refuses it with weight streaming.
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and "weight-streaming" not in flags:
        found.add("REQUIRE_USER_ALLOCATION")
    if "stripped" in flags:
        found |= {"STRIP_PLAN", "REFIT_IDENTICAL" if hasattr(trt.BuilderFlag, "REFIT_IDENTICAL") else "REFIT"}
    if "refit" in flags:
        found.discard("REFIT_IDENTICAL")
    if "weight-streaming" in flags:
        found.add("WEIGHT_STREAMING")
    return sorted(found)


def _parse(job: Job) -> tuple[Any, Any, Any]:
    trt = job.library.module
    logger = trt_logger(trt, job.said, lambda message: _log.info("%s: %s", where(job), message))
    builder = trt.Builder(logger)
    # TensorRT 11 has no other networks; before that it must be asked for, or precision would be the builder's choice.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    # by path, because the weights lie in a file beside it
    if not job.graph.is_file() or not parser.parse_from_file(str(job.graph)):
        raise EngineError(f"{where(job)}: {_weights_fault(job.graph) or _parse_error(parser)}")
    if network.num_inputs == 0 or network.num_outputs == 0:
        raise EngineError(f"{where(job)}: it has no inputs or outputs; it is not a graph of a bundle: export it again")
    return builder, network, parser


def _parse_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it can't be read; it is not an ONNX graph, or is damaged: export it again"
    error = parser.get_error(0)
    operator = getattr(error, "node_operator", str)()
    why = " ".join(str(error.desc()).split())
    if not operator:
        return f"it can't be read ({why}); it is not an ONNX graph of ours, or is damaged: export it again"
    node = getattr(error, "node_name", str)()
    told = repr(node) if node else f"number {error.node()}, which has no name,"
    return (
        f"its node {told} ({operator}) is not supported ({why}); export the bundle with this version's vega-edge export"
    )


def _weights_fault(graph: Path) -> str:
    """What the library itself tells without the file's name."""
    with contextlib.suppress(BundleError):  # no ONNX file at all: `_parse_error`
        for weight in read_weights(graph).values():
            if not weight.file.is_file():
                return f"its weights are missing: there is no {weight.file.name} beside it; copy or export the bundle again"
            if (size := weight.file.stat().st_size) < weight.offset + weight.length:
                return f"its weights in {weight.file.name} are truncated, {size} bytes; copy or export the bundle again"
    return ""


def where(job: Job) -> str:
    """ "unet/model.onnx": what an error is about."""
    return f"{job.graph.parent.name}/{job.graph.name}"


def _timing_cache(job: Job, config: Any) -> Any:
    """What TensorRT measured about kernels before, to measure it once; TensorRT-RTX measures nothing when it builds."""
    if job.library.portable:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(job.timing_cache)
        if not config.set_timing_cache(cache, False):  # False: one of another GPU is refused, not used
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    return cache


def _monitor(library: Library, progress: Progress) -> Any:
    trt = library.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Phases lie within steps of other phases; the share is that of the outermost."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}  # name -> [steps done, steps], outermost first
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, max(num_steps, 1)]

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1
            self._share = max(self._share, share(list(self._phases.values())))
            progress(self._share, next(reversed(self._phases), ""))
            return True

    return Monitor()


def share(phases: list[list[int]]) -> float:
    """Of the outermost phase: each later one is inside the step that the one before it is at. [[done, of], ...] -> 0 to 1."""
    done = 0.0
    for steps_done, steps in reversed(phases):
        done = min((steps_done + done) / steps, 1.0)
    return done
