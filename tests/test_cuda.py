"""What is said when CUDA refuses; a made-up runtime stands for cuda-python's."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from vega_edge.engines import cuda, nvidia
from vega_edge.engines.trt_errors import not_usable
from vega_edge.errors import EngineError


class Runtime(SimpleNamespace):
    """One GPU; `codes`: what a call answers instead of success."""

    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, **codes):
        super().__init__(codes=codes, calls=[], count=1)

    def __getattr__(self, name):
        if not name.startswith("cuda") or name.endswith("Kind"):
            raise AttributeError(name)
        values = {"cudaGetDeviceCount": [1], "cudaMalloc": [4096], "cudaMemGetInfo": [2 * 10**9, 8 * 10**9]}
        values |= {"cudaGetErrorName": [b"cudaErrorX"], "cudaGetErrorString": [b"went wrong"]}

        def call(*arguments):
            self.calls.append(name)
            return (
                self.codes.get(name, 0),
                *values.get(name, [7] if "Create" in name or "Instantiate" in name else []),
            )

        return call

    def getLocalRuntimeVersion(self):
        return 0, 13000


@pytest.fixture
def opened(monkeypatch):
    def make(**codes):
        runtime = Runtime(**codes)
        monkeypatch.setattr(cuda, "load_runtime", lambda: runtime)
        return cuda.CudaDevice(0), runtime

    return make


def refused(call, *args, **kwargs):
    with pytest.raises(EngineError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_a_driver_that_is_too_old(opened, monkeypatch):
    monkeypatch.setattr(nvidia, "driver_cuda", lambda: (12, 2))
    assert refused(opened, cudaGetDeviceCount=35) == (
        "the NVIDIA driver is too old: it knows CUDA 12.2, and cuda-python brings CUDA 13.0; update the driver, or "
        "install an older cuda-python"
    )


def test_a_gpu_without_room(opened):
    device, _ = opened(cudaMalloc=2)
    assert refused(device.allocate, 3_000_000_000) == (
        "GPU 0 has too little memory for 3000 MB: 2.0 of 8.0 GB are free; close what else uses it (see nvidia-smi), draw "
        "smaller or fewer pictures, or use --memory low"
    )


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cuda, "load_runtime", Runtime)
    assert refused(cuda.CudaDevice, 1) == "there is no cuda:1; this machine has 1 NVIDIA GPUs, numbered from 0"


def test_any_other_error_has_its_name(opened):
    device, _ = opened(cudaStreamSynchronize=700)
    assert refused(device.synchronize) == "cudaErrorX (700): went wrong"


def test_a_capture_that_fails_ends(opened):
    """Else every later call on the stream would fail too."""
    device, runtime = opened()

    def fail():
        raise EngineError("no")

    assert refused(device.capture, fail) == "no"
    assert runtime.calls[-2:] == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]


def test_a_stream_is_destroyed_once(opened):
    device, runtime = opened()
    device.close()
    device.close()
    assert runtime.calls.count("cudaStreamDestroy") == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["CUDA error 2 Out of Memory"], "the GPU has 1.5 of 8.0 GB free, too little for it; close what else uses it (see nvidia-smi), or use --memory low"),
        (["CUDA driver version is insufficient"], "CUDA driver version is insufficient; update the NVIDIA driver"),
        (["Serialization assertion failed"], "Serialization assertion failed; build it again with vega-edge build"),
        ([], "the library gave no reason; build it again with vega-edge build"),
    ],
)  # fmt: skip
def test_why_a_plan_is_not_loaded_by_what_was_said(said, why):
    assert not_usable(said, set(), (1_500_000_000, 8_000_000_000), "sm_89") == why


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ("OLD_CUDA_DRIVER", "the NVIDIA driver is too old for it; update the driver"),
        ("UNSUPPORTED_CC", "it was not built for this GPU, sm_89; build it with vega-edge build --target sm_89"),
        ("INSUFFICIENT_GPU_MEMORY", "the GPU has 1.5 of 8.0 GB free, too little for it; close what else uses it (see nvidia-smi), or use --memory low"),
        ("MALFORMED_ENGINE", "words; build it again with vega-edge build"),
    ],
)  # fmt: skip
def test_why_a_plan_is_not_loaded_by_what_the_library_finds(found, why):
    assert not_usable(["words"], {found}, (1_500_000_000, 8_000_000_000), "sm_89") == why


# What is called without a GPU being there to call it: the names at least must exist in the packages that are installed.

TENSORRT_NAMES = {
    "Runtime": "deserialize_cuda_engine get_engine_validity engine_header_size",
    "EngineInvalidityDiagnostics": "INSUFFICIENT_GPU_MEMORY OLD_CUDA_DRIVER UNSUPPORTED_CC",
    "ICudaEngine": "get_tensor_name num_io_tensors get_tensor_mode num_optimization_profiles create_execution_context "
    "get_tensor_dtype get_tensor_shape get_tensor_profile_shape create_runtime_config weight_streaming_budget_v2 "
    "get_weight_streaming_automatic_budget device_memory_size_v2",
    "IExecutionContext": "set_optimization_profile_async set_input_shape infer_shapes get_tensor_shape "
    "set_device_memory set_tensor_address execute_async_v3 update_device_memory_size_for_shapes device_memory "
    "is_stream_capturable",
    "IBuilderConfig": "set_preview_feature",
    "PreviewFeature": "RUNTIME_ACTIVATION_RESIZE_10_10",
    "BuilderFlag": "REFIT REFIT_IDENTICAL REQUIRE_USER_ALLOCATION STRIP_PLAN WEIGHT_STREAMING",
    "IRuntimeConfig": "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy "
    "cuda_graph_strategy create_runtime_cache set_runtime_cache",
    "IRuntimeCache": "serialize deserialize",
    "Refitter": "set_named_weights refit_cuda_engine get_missing_weights",
    "OnnxParserRefitter": "refit_from_file num_errors get_error",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "CudaGraphStrategy": "DISABLED",
    "DataType": "FLOAT HALF INT32 INT64 INT8 UINT8 BOOL BF16",
}


@pytest.mark.parametrize("owner", TENSORRT_NAMES)
def test_tensorrt_rtx_has_what_is_called(owner):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert [name for name in TENSORRT_NAMES[owner].split() if not hasattr(getattr(trt, owner), name)] == []


def test_cuda_python_has_what_is_called():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    tree = ast.parse(Path(cuda.__file__).read_text(encoding="utf-8"))
    names = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")
    } - {"cuda"}
    assert len(names) > 20
    assert [name for name in sorted(names) if not hasattr(runtime, name) and not _is_member(runtime, name)] == []


def _is_member(runtime, name):
    kinds = (runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    return any(hasattr(kind, name) for kind in kinds)
