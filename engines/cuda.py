"""One CUDA device with one stream, through cuda-python: thin, because nothing here can be tested without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import EngineError
from . import nvidia
from .device_io import Bytes

_OLD_DRIVER, _NO_MEMORY = 35, 2  # cudaErrorInsufficientDriver, cudaErrorMemoryAllocation


class CudaDevice:
    """GPU `index`, in CUDA's order. The stream is made here, and `close` destroys it: buffers and graphs first."""

    def __init__(self, index: int = 0) -> None:
        self._cuda = cuda = load_runtime()
        self.index = index
        self._pinned: dict[int, int] = {}  # address -> size
        count = self._call(cuda.cudaGetDeviceCount())
        if not 0 <= index < count:
            raise EngineError(f"there is no cuda:{index}; this machine has {count} NVIDIA GPUs, numbered from 0")
        self.activate()
        self.stream = self._call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))

    def activate(self) -> None:
        """A thread begins on GPU 0, whatever another thread chose."""
        self._call(self._cuda.cudaSetDevice(self.index))

    def allocate(self, size: int) -> int:
        return int(self._call(self._cuda.cudaMalloc(size), size))

    def free(self, pointer: int) -> None:
        self._call(self._cuda.cudaFree(pointer))

    def pin(self, size: int) -> Bytes:
        address = int(self._call(self._cuda.cudaHostAlloc(size, self._cuda.cudaHostAllocDefault), size))
        self._pinned[address] = size
        memory = (ctypes.c_uint8 * size).from_address(address)
        staging: Bytes = np.ctypeslib.as_array(memory)
        return staging

    def unpin(self, staging: Bytes) -> None:
        address = staging.ctypes.data
        del self._pinned[address]
        self._call(self._cuda.cudaFreeHost(address))

    def upload(self, pointer: int, staging: Bytes) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(pointer, staging.ctypes.data, staging.nbytes, kind, self.stream))

    def download(self, staging: Bytes, pointer: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(staging.ctypes.data, pointer, staging.nbytes, kind, self.stream))

    def synchronize(self) -> None:
        self._call(self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream, as a graph that can be replayed; it does not run now."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            enqueue()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self.stream)  # the stream leaves capture mode even so
            raise
        graph = self._call(self._cuda.cudaStreamEndCapture(self.stream))
        try:
            return self._call(self._cuda.cudaGraphInstantiate(graph, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy(graph))

    def replay(self, graph: Any) -> None:
        self._call(self._cuda.cudaGraphLaunch(graph, self.stream))

    def destroy(self, graph: Any) -> None:
        self._call(self._cuda.cudaGraphExecDestroy(graph))

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, of the whole GPU, other programs' included."""
        self.activate()
        free, total = self._call(self._cuda.cudaMemGetInfo())
        return int(free), int(total)

    def close(self) -> None:
        if self.stream is not None:
            self._call(self._cuda.cudaStreamDestroy(self.stream))
            self.stream = None

    def _call(self, result: Any, size: int = 0) -> Any:
        """cuda-python returns (error, value, ...): the value, the values, or None; EngineError for an error."""
        code, *values = result
        number = int(code)
        if number == 0:
            return values[0] if len(values) == 1 else (tuple(values) or None)
        if number == _NO_MEMORY:
            raise EngineError(self._no_memory(size))
        raise EngineError(describe(self._cuda, code))

    def _no_memory(self, size: int) -> str:
        code, free, total = self._cuda.cudaMemGetInfo()
        return nvidia.no_memory(self.index, size, None if int(code) else (free, total))


def free_bytes(index: int) -> int:
    """Of GPU `index`; on a Jetson, of the memory that CPU and GPU share."""
    select(index)
    cuda = load_runtime()
    code, free, _ = cuda.cudaMemGetInfo()
    if int(code):
        raise EngineError(describe(cuda, code))
    return int(free)


def select(index: int) -> None:
    """Makes GPU `index` the calling thread's. EngineError where that is refused."""
    cuda = load_runtime()
    (code,) = cuda.cudaSetDevice(index)
    if int(code):
        raise EngineError(describe(cuda, code))


def load_runtime(extra: str = "tensorrt-rtx") -> Any:
    """CUDA's runtime API from cuda-python. EngineError if it is missing, which vega-edge[extra] brings."""
    try:
        from cuda.bindings import runtime  # type: ignore[import, unused-ignore]
    except ImportError as failure:
        raise EngineError(f'cuda-python can\'t be imported ({failure}); pip install "vega-edge[{extra}]"') from failure
    return runtime


def describe(cuda: Any, code: Any) -> str:
    number = int(code)
    if number == _OLD_DRIVER:
        wanted = cuda.getLocalRuntimeVersion() if hasattr(cuda, "getLocalRuntimeVersion") else (0, 0)
        needs = f"CUDA {int(wanted[1]) // 1000}.{int(wanted[1]) % 1000 // 10}" if int(wanted[1]) else "a newer CUDA"
        return f"the NVIDIA driver is too old: {_driver()}, and cuda-python brings {needs}; update the driver, or install an older cuda-python"
    name = str(cuda.cudaGetErrorName(code)[1].decode())
    text = str(cuda.cudaGetErrorString(code)[1].decode())
    return f"{name} ({number}): {text}"


def _driver() -> str:
    try:
        return "it knows CUDA {}.{}".format(*nvidia.driver_cuda())
    except EngineError as failure:
        return str(failure)
