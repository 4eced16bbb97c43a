"""Which NVIDIA GPUs the driver shows, asked of its own library: needs no package and takes no memory on the GPU."""

from __future__ import annotations

import ctypes
import sys

from ..errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE of the CUDA driver API


def devices() -> list[str]:
    """Names of the GPUs, in CUDA's order. Raises EngineError that says why there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as failure:
        raise EngineError(f"there is no NVIDIA driver ({LIBRARY} can't be loaded)") from failure
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code == NO_DEVICE or (code == 0 and count.value == 0):
        raise EngineError("the NVIDIA driver shows no GPU")
    if code:
        raise EngineError(f"the NVIDIA driver does not work (CUDA error {code})")
    return [_name(driver, index) for index in range(count.value)]


def _name(driver: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        return f"GPU {index}"
    return name.value.decode("utf-8", "replace")
