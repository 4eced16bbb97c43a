"""Which NVIDIA GPUs the driver shows, asked of its own library: needs no package and takes no memory on the GPU."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from ..errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
JETSON = Path("/etc/nv_tegra_release")  # of Jetson Linux
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE of the CUDA driver API
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


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


def has_fp8(capability: str) -> bool:
    """Of 'sm_89', Ada, and all later ones."""
    return int(capability.removeprefix("sm_")) >= 89


def compute_capability(index: int = 0) -> str:
    """Of GPU `index`: 'sm_87'. Raises EngineError if there is no such GPU."""
    names = devices()
    if not 0 <= index < len(names):
        raise EngineError(f"there is no cuda:{index}; the GPUs are: {', '.join(_numbered(names))}")
    driver, device = ctypes.CDLL(LIBRARY), ctypes.c_int()
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        number = ctypes.c_int()
        code = driver.cuDeviceGet(ctypes.byref(device), index)
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        if code:
            raise EngineError(f"the NVIDIA driver does not tell what GPU {index} can do (CUDA error {code})")
        numbers.append(number.value)
    return f"sm_{numbers[0]}{numbers[1]}"


def driver_cuda() -> tuple[int, int]:
    """The newest CUDA that the driver knows: (13, 0). Raises EngineError where there is no driver."""
    devices()
    version = ctypes.c_int()
    ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def no_memory(gpu: int, wanted: int = 0, left: tuple[int, int] | None = None) -> str:
    """What to say where GPU `gpu` had no `wanted` bytes (0: not known) to give; `left`: bytes free and in all."""
    room = f": {left[0] / 1e9:.1f} of {left[1] / 1e9:.1f} GB are free" if left else ""
    amount = f" for {wanted / 1e6:.0f} MB" if wanted else ""
    return (
        f"GPU {gpu} has too little memory{amount}{room}; close what else uses it (see nvidia-smi), draw smaller or fewer "
        "pictures, or use --memory low"
    )


def _numbered(names: list[str]) -> list[str]:
    return [f"cuda:{index} ({name})" for index, name in enumerate(names)]


def _name(driver: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        return f"GPU {index}"
    return name.value.decode("utf-8", "replace")
