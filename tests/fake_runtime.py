"""What `tensorrt` and `tensorrt_rtx` do with a plan, as their API is documented: records what it is told, computes nothing."""

from __future__ import annotations

from types import SimpleNamespace

from .fake_tensorrt import ILogger


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

    def create_runtime_config(self):
        return Config(self.trt)

    def create_execution_context(self, how):
        return self.trt.context_class(self.trt)


class Config:
    def __init__(self, trt):
        self.trt = trt

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return self.trt.cache

    def set_runtime_cache(self, cache):
        self.trt.told.append("cache set")


class Cache:
    def __init__(self, known=()):
        self.content, self.known = b"", known

    def serialize(self):
        return self.content

    def deserialize(self, content):
        if content not in self.known:
            return False
        self.content = content
        return True


class Context:
    """Of TensorRT before shapes decided about scratch memory."""

    def __init__(self, trt):
        self.trt = trt

    def set_optimization_profile_async(self, profile, stream):
        return True

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        pass

    def set_device_memory(self, memory, size):
        self.trt.told.append(("scratch", size))

    def execute_async_v3(self, stream):
        self.trt.cache.content += b"kernel" if self.trt.compiles else b""
        return True


class SizedContext(Context):
    """As TensorRT 10.3 and later."""

    _memory = 0

    def update_device_memory_size_for_shapes(self):
        return 100 * self.shape[0]

    @property
    def device_memory(self):
        return self._memory

    @device_memory.setter
    def device_memory(self, memory):
        self._memory = memory
        self.trt.told.append("scratch")


class LaterContext(Context):
    """As one without the older way to hand memory over."""

    def update_device_memory_size_for_shapes(self):
        raise AssertionError("of no use without device_memory")


class FakeRuntime(SimpleNamespace):
    """`told`: in order, what was asked of contexts and refitters. `missing`: weights that the plan wants and no file has."""

    def __init__(self, context_class=SizedContext, known=(), missing=(), rtx=True):
        super().__init__(
            __version__="1.7", ILogger=ILogger, TensorIOMode=SimpleNamespace(INPUT="input"), told=[], compiles=True,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2), cache=Cache(known), missing=list(missing),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1), CudaGraphStrategy=SimpleNamespace(DISABLED=0),
            context_class=context_class, Weights=lambda array: array,
        )  # fmt: skip
        if rtx:
            self.IRuntimeCache = Cache
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self.deserialize)
        self.Refitter = lambda engine, logger: SimpleNamespace(
            set_named_weights=lambda name, value: self.told.append(("set", name)) or True,
            refit_cuda_engine=lambda: self.told.append("refit") or not self.missing,
            get_missing_weights=lambda: self.missing,
        )
        self.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
            refit_from_file=lambda path: self.told.append(("all of", path)) or True
        )

    def deserialize(self, content):
        self.told.append(("load", bytes(content)))
        return Engine(self)
