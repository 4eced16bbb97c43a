"""Graphs on TensorRT or TensorRT-RTX: finds the plan that was built of one, loads it, and runs it with CUDA.

What to do when is decided in plan_engine.py; which plan, in plan_choice.py. Here is what calls the library.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from . import nvidia, trt_errors
from .cuda import CudaDevice, load_runtime
from .plan_choice import Chosen, Here, choose_plans
from .plan_engine import PlanEngine
from .plan_range import Profile, SeveralPlans, Shape
from .plan_store import Plan, PlanStore
from .protocol import Engine, Opening, Spec
from .rtx_cache import RuntimeCache
from .trt_logger import alone, logger

_log = logging.getLogger(__name__)
# names of TensorRT's DataType members that numpy has too
_DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "INT8": "i1", "UINT8": "u1", "BOOL": "?"}
# of weights that are replaced; the bits of bfloat16, which numpy lacks, come as uint16
_WEIGHTS = {**{np.dtype(kind): name for name, kind in _DTYPES.items()}, np.dtype("u2"): "BF16"}


def open_graph(path: Path, module: str, how: Opening) -> Engine:
    """`module`: tensorrt or tensorrt_rtx. The plans are those that `vega-edge build` made of this graph, for this GPU."""
    trt = import_module(module)
    store = PlanStore(path.parent.parent)
    chosen = choose_plans(store, path, here(module, how.gpu), how.weights)
    if len(chosen) == 1:
        return _open_plan(trt, store, chosen[0], path, how)
    return SeveralPlans([each.plan.profile for each in chosen], lambda i: _open_plan(trt, store, chosen[i], path, how))


def _open_plan(trt: Any, store: PlanStore, chosen: Chosen, path: Path, how: Opening) -> PlanEngine:
    with contextlib.ExitStack() as undo:
        device = CudaDevice(how.gpu)
        undo.callback(device.close)
        with alone():
            program = _Program(trt, chosen.plan, store.read(chosen.plan), device, how.cache)
        undo.callback(program.close)
        if chosen.refit or "stripped" in chosen.plan.flags:  # one that was built with a LoRA has lost that too
            with alone():
                program.refit(path, how.weights)
        streams = "weight-streaming" in chosen.plan.flags  # its runs copy weights, and it was not built to be captured
        engine = PlanEngine(program, device, chosen.rebuild, graphs=not streams)
        undo.pop_all()  # the engine closes both
        return engine


def version(module: str) -> str:
    """Of tensorrt or tensorrt_rtx: only one of them may be installed."""
    return str(import_module(module).__version__)


def device(module: str) -> str:
    """The GPUs, for people. Raises EngineError if the library can't use any of them."""
    trt, names = import_module(module), nvidia.devices()
    load_runtime(_extra(module))
    known = capabilities(trt)
    found = [nvidia.compute_capability(i) for i in range(len(names))]
    if known and not set(found) & known:
        listed = ", ".join(f"{name} is {sm}" for name, sm in zip(names, found, strict=True))
        raise EngineError(f"{module.replace('_', '-')} runs on {', '.join(sorted(known))}, and {listed}; use tensorrt")
    return ", ".join(names)


def _extra(module: str) -> str:
    """What brings cuda-python, in the version that the library's CUDA is of."""
    if module == "tensorrt":
        return "jetson" if nvidia.JETSON.is_file() else "tensorrt"
    return module.replace("_", "-")


def here(module: str, gpu: int) -> Here:
    """What decides whether a plan runs on GPU `gpu`."""
    trt = import_module(module)
    capability = nvidia.compute_capability(gpu)
    return Here(module.replace("_", "-"), str(trt.__version__), capability, capabilities(trt))


def capabilities(trt: Any) -> frozenset[str]:
    """What TensorRT-RTX can run on, 'sm_86' and so on; TensorRT names none, and runs where it was built."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return frozenset(f"sm_{name[2:]}" for name in members if name.startswith("SM"))


class _Program:
    """A deserialized plan. See `plan_engine.Program`."""

    def __init__(self, trt: Any, plan: Plan, content: memoryview, device: CudaDevice, cache: Path | None) -> None:
        self._trt, self._device, self._said = trt, device, list[str]()
        self._logger = logger(trt, self._said, _log.debug)
        self._runtime = trt.Runtime(self._logger)
        self._file, self._header = plan.file, bytes(content[: getattr(self._runtime, "engine_header_size", 0)])
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(f"{plan.file} can't be loaded: {self._not_usable()}")
        if "weight-streaming" in plan.flags:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs = {name: self._spec(name) for name in inputs}
        self.outputs = {name: self._spec(name) for name in names if name not in inputs}
        self.profiles = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        self._managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._cache = RuntimeCache(trt, self._engine, cache, nvidia.devices()[device.index], plan.key)

    @property
    def scratch_bytes(self) -> int:
        """Of the largest shape."""
        name = "device_memory_size_v2" if hasattr(self._engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(self._engine, name))

    def context(self, profile: int, shapes: Mapping[str, Shape]) -> _Context:
        config = self._cache.config(self._managed)
        context = self._engine.create_execution_context(self._managed if config is None else config)
        if context is None:
            raise EngineError(f"{self._file} can't be run: {self._not_usable()}")
        return _Context(context, self._device, profile, shapes, self)

    def refit(self, graph: Path, weights: Mapping[str, Any]) -> None:
        """All weights from the bundle's `graph`, then those replaced: the library combines weights, and takes one of them
        only with the others."""
        trt = self._trt
        refitter = trt.Refitter(self._engine, self._logger)
        parser = trt.OnnxParserRefitter(refitter, self._logger)  # kept until the end: it may hold what it read
        if not parser.refit_from_file(str(graph)):
            self._said += trt_errors.parser_errors(parser)
            raise EngineError(f"{graph.parent.name}/{graph.name} does not fit the engine built of it: {self.why()}")
        kept = {name: np.ascontiguousarray(array) for name, array in weights.items()}  # read when it refits, not before
        for name, array in kept.items():
            kind = getattr(trt.DataType, _WEIGHTS[array.dtype])
            if not refitter.set_named_weights(name, trt.Weights(kind, array.ctypes.data, array.size)):
                raise EngineError(f"the engine takes no new {name!r}: {self.why()}; build with --lora instead")
        if not refitter.refit_cuda_engine():
            missing = refitter.get_missing_weights()
            raise EngineError(f"refitting failed ({len(missing)} weights are missing): {self.why()}")

    def why(self) -> str:
        return trt_errors.why(self._said)

    def _not_usable(self) -> str:
        found = trt_errors.diagnose(self._trt, self._runtime, self._header)
        capability = nvidia.compute_capability(self._device.index)
        return trt_errors.not_usable(self._said, found, self._device.memory(), capability)

    def compiled(self) -> None:
        """A context ran for the first time, and may have compiled kernels: kept now, as nobody may come to close it."""
        self._cache.save()

    def close(self) -> None:
        self._cache.save()
        self._cache.close()
        with alone():
            self._engine = self._runtime = None  # the library frees what nothing refers to, in this order

    def _spec(self, name: str) -> Spec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(f"{name!r} is {kind}, which is not among: {', '.join(_DTYPES)}")
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return Spec(np.dtype(_DTYPES[kind]), shape)

    def _profile(self, index: int) -> Profile:
        free = [name for name, spec in self.inputs.items() if None in spec.shape]
        shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in free}
        return {name: tuple(tuple(map(int, shape)) for shape in ranges) for name, ranges in shapes.items()}


class _Context:
    """See `plan_engine.Context`."""

    def __init__(
        self, context: Any, device: CudaDevice, profile: int, shapes: Mapping[str, Shape], program: _Program
    ) -> None:
        self._context, self._device, self._program = context, device, program
        self._compiled = False
        if not context.set_optimization_profile_async(profile, int(device.stream)):
            raise EngineError(f"profile {profile} can't be used: {program.why()}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"input {name!r} can't be {shape}: {program.why()}")
        if unknown := context.infer_shapes():
            raise EngineError(f"the shapes leave {', '.join(unknown)} open")
        self.outputs = {name: tuple(map(int, context.get_tensor_shape(name))) for name in program.outputs}
        # Of these shapes; without RUNTIME_ACTIVATION_RESIZE_10_10 in the plan, or this method, it is the largest shape's.
        # 0 may also mean that the library could not tell.
        size = getattr(context, "update_device_memory_size_for_shapes", int)
        self.scratch_bytes = int(size()) or program.scratch_bytes
        device.synchronize()

    def bind(self, addresses: Mapping[str, int], scratch: int) -> None:
        if scratch and hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(scratch, self.scratch_bytes)
        elif scratch:
            self._context.device_memory = scratch
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"{name!r} can't be bound to its memory: {self._program.why()}")

    def check_capturable(self) -> None:
        """TensorRT can't tell."""
        asks = getattr(self._context, "is_stream_capturable", None)
        if asks is not None and not asks(int(self._device.stream)):
            raise EngineError("the library says that its runs can't be captured; build it again with vega-edge build")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._device.stream)):
            raise EngineError(self._program.why())
        if not self._compiled:
            self._compiled = True
            self._program.compiled()

    def close(self) -> None:
        self._context = None
