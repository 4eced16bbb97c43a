"""What `tensorrt` and `tensorrt_rtx` do with a plan, as their API is documented: records what it is told, computes nothing."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

from .fake_tensorrt import ILogger

KINDS = {"FLOAT": "f4", "HALF": "f2", "BF16": "u2"}


class Engine:
    """One input x float32[n, 4] and one output y; 1 MB of scratch memory at most, 100 bytes for each n."""

    num_io_tensors, num_optimization_profiles, device_memory_size_v2 = 2, 1, 1_000_000

    def __init__(self, trt):
        self.trt = trt

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if name == "x" else "output"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name):
        return (-1, 4)

    def get_tensor_profile_shape(self, name, index):
        return [(1, 4), (1, 4), (8, 4)]

    def get_weight_streaming_automatic_budget(self):
        return 1

    def create_runtime_config(self):
        return Config(self.trt)

    def create_execution_context(self, how):
        return self.trt.context_class and self.trt.context_class(self.trt)


class Config:
    def __init__(self, trt):
        self.trt = trt

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return self.trt.cache

    def set_runtime_cache(self, cache):
        self.trt.told.append("cache set")
        return "cache" not in self.trt.refuses


class Cache:
    """`serialize` gives an IHostMemory, which is a buffer and no bytes."""

    def __init__(self, known=()):
        self.content, self.known = b"", known

    def serialize(self):
        return memoryview(self.content)

    def deserialize(self, content):
        if content not in self.known:
            return False
        self.content = content
        return True


class Context:
    """Of a library that does not tell how much scratch memory a shape takes."""

    def __init__(self, trt):
        self.trt = trt

    def set_optimization_profile_async(self, profile, stream):
        return "profile" not in self.trt.refuses

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        return name not in self.trt.refuses

    def set_device_memory(self, memory, size):
        self.trt.told.append(("scratch", size))

    def is_stream_capturable(self, stream):
        assert stream == 7
        return "capture" not in self.trt.refuses

    def execute_async_v3(self, stream):
        self.trt.cache.content += b"kernel" if self.trt.compiles else b""
        return True


class SizedContext(Context):
    """As TensorRT 10.3 and later: the size goes with the memory, and must be of the shapes at least."""

    def update_device_memory_size_for_shapes(self):
        return 100 * self.shape[0]


class UnsureContext(Context):
    """0 is its answer for an error, too."""

    def update_device_memory_size_for_shapes(self):
        return 0


class OldContext(SizedContext):
    """Without the way to hand memory over that takes a size."""

    set_device_memory = property()  # hasattr is False

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "device_memory":
            self.trt.told.append("scratch")


def weights(kind, address, count):
    """As the library's own: it reads them later, from where they lie."""
    kind = np.dtype(KINDS[kind])
    return np.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(address), kind)


class FakeRuntime(SimpleNamespace):
    """`told`: in order, what was asked of contexts and refitters. `missing`: weights that the plan wants and no file has.

    refuses: what fails, profile, capture, cache, plan, graph (to be refitted with), or a tensor's name. finds: what is wrong
    with a plan, as bits.
    """

    FINDINGS = SimpleNamespace(
        __members__={
            name: SimpleNamespace(value=bit)
            for name, bit in (("UNSUPPORTED_CC", 2), ("OLD_CUDA_DRIVER", 4), ("INSUFFICIENT_GPU_MEMORY", 16))
        }
    )

    def __init__(self, context_class=SizedContext, known=(), missing=(), rtx=True, refuses=(), finds=0):
        super().__init__(
            __version__="1.7", ILogger=ILogger, TensorIOMode=SimpleNamespace(INPUT="input"), told=[], compiles=True,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2), cache=Cache(known), missing=list(missing),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1), CudaGraphStrategy=SimpleNamespace(DISABLED=0),
            context_class=context_class, Weights=weights, DataType=SimpleNamespace(**{kind: kind for kind in KINDS}),
            refuses=refuses, EngineInvalidityDiagnostics=self.FINDINGS,
        )  # fmt: skip
        if rtx:
            self.IRuntimeCache = Cache
        checks = {"engine_header_size": 2, "get_engine_validity": lambda plan: ("INVALID", finds)} if rtx else {}
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self.deserialize, **checks)
        self.Refitter = lambda engine, logger: SimpleNamespace(
            set_named_weights=lambda name, value: self.told.append(("set", name, value.tolist())) or True,
            refit_cuda_engine=lambda: self.told.append("refit") or not self.missing,
            get_missing_weights=lambda: self.missing,
        )
        self.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
            refit_from_file=lambda path: self.told.append(("all of", path)) or "graph" not in refuses,
            num_errors=1, get_error=lambda index: SimpleNamespace(desc=lambda: "no weights\nof that name"),
        )  # fmt: skip

    def deserialize(self, content):
        self.told.append(("load", bytes(content)))
        return None if "plan" in self.refuses else Engine(self)
