"""The engines by name, whether each can be had here, and which one `auto` takes: a GPU's engine is tried for that."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import EngineError, UsageError, unknown
from . import nvidia
from .checked import reason
from .dtypes import refusal
from .plan_choice import BuiltFor, choose_plans, lacking
from .plan_store import PlanStore

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    package: str  # what is imported; the file in this folder has the same name, unless `file` says otherwise
    setting: str  # what that file's open_graph is told
    extra: str  # what to install: vega-edge[extra]
    file: str = ""

    @property
    def module(self) -> str:
        return self.file or self.package


_PROVIDERS = {"onnxruntime-cuda": ("cuda", "CUDA"), "onnxruntime-tensorrt": ("tensorrt", "TensorRT")}


class Missing(NamedTuple):
    why: str
    cure: str


ENGINES: Mapping[str, Backend] = {
    "onnxruntime-cpu": Backend("onnxruntime", "CPUExecutionProvider", "cpu"),
    "onnxruntime-cuda": Backend("onnxruntime", "CUDAExecutionProvider", "cuda", "onnxruntime_cuda"),
    "onnxruntime-tensorrt": Backend("onnxruntime", "TensorrtExecutionProvider", "cuda", "onnxruntime_cuda"),
    "tensorrt": Backend("tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": Backend("tensorrt_rtx", "tensorrt_rtx", "tensorrt-rtx", "tensorrt"),
    "openvino": Backend("openvino", "f32", "openvino"),
    "openvino-bf16": Backend("openvino", "bf16", "openvino"),
}

# Fastest first among those with full precision; openvino-bf16 rounds to 8 bits, so it is only for those who ask for it.
# onnxruntime-tensorrt builds engines for minutes when it first meets a shape, so it is not chosen either.
AUTO = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime-cpu")
_ON_CPU = ("onnxruntime-cpu", "openvino", "openvino-bf16")
# OpenVINO compiles a graph for seconds before it runs it faster; below this size onnxruntime is done by then.
SMALL_BYTES = 100_000_000


def choose_engine(
    model_bytes: int | None = None,
    built: BuiltFor | None = None,
    device: str | None = None,
    precision: tuple[str, str] | None = None,
) -> str:
    """The engine that `auto` stands for here, logged in one line with the reason for each that was passed over.

    `model_bytes`: size of the model's graphs, where known. `built`: the model, since TensorRT runs what was built of it.
    `device`: cpu, cuda or cuda:N; None for any. `precision`: dtype and weights of the model's manifest. Choose once for
    all graphs of a model. Raises EngineError if no engine can be used.
    """
    name, passed = best_engine(model_bytes, built, device, precision)
    if not name:
        raise EngineError(f"no engine can be used: {'; '.join(passed)}; {_engine_cure(device)}")
    log.info("engine %s, chosen automatically; passed over: %s", name, "; ".join(passed) or "none")
    return name


def best_engine(
    model_bytes: int | None = None,
    built: BuiltFor | None = None,
    device: str | None = None,
    precision: tuple[str, str] | None = None,
) -> tuple[str, list[str]]:
    """As `choose_engine`, without a log: the name, '' if there is none, and each that was passed over with its reason."""
    passed: list[str] = []
    small = model_bytes is not None and model_bytes < SMALL_BYTES and missing_here("onnxruntime-cpu") is None
    small = small and not (precision and refusal("onnxruntime-cpu", precision))
    gpu = gpu_index(device)
    for name in AUTO:
        missing = missing_here(name) or _wrong_device(name, device)
        if missing is None and precision and (why := refusal(name, precision)):
            missing = Missing(why, "")
        if missing is None and name == "openvino" and small:
            missing = Missing("it would compile for longer than a model this small takes to run", "")
        if missing is None and not runs_on_cpu(name):
            missing = _not_loaded(name)
        if missing is None and name in ("tensorrt-rtx", "tensorrt"):
            missing = _missing_plans(name, built, gpu)
        if missing is None:
            return name, passed
        passed.append(f"{name} ({missing.why})")
    return "", passed


def _engine_cure(device: str | None) -> str:
    """What to do where no engine can be used at all, or none on `device`."""
    if device is None or device == "cpu":
        return install_line("cpu")
    missing = missing_here("onnxruntime-cuda")
    return f"{missing.cure if missing else install_line('cuda')}, or leave --device out"


def gpu_index(device: str | None) -> int:
    """'cuda:1' -> 1; 0 for 'cuda', 'cpu' and None. UsageError for anything else."""
    text = "cuda" if device is None else device
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text) if isinstance(text, str) else None
    if not match:
        raise UsageError(f"device must be cpu, cuda or cuda:N, such as cuda:0, not {device!r}")
    return int(match[1] or 0)


def check_engine(name: str, device: str | None = None) -> None:
    """Raises UsageError for a name that is neither "auto" nor one of ENGINES, or if that engine can't run on `device`;
    EngineError if it can't be used here, as far as that is known without importing it."""
    if name not in ("auto", *ENGINES):
        raise unknown("engine", name, ["auto", *ENGINES])
    gpu_index(device)
    if name == "auto":
        return
    if wrong := _wrong_device(name, device):
        raise UsageError(f"engine {name}: {wrong.why}; leave --device out, or choose another engine")
    if missing := missing_here(name):
        raise EngineError(f"engine {name}: {missing.why}; {missing.cure}")


def built_shapes(graph: Path, name: str, device: str | None = None) -> dict[str, tuple[int, ...]]:
    """Input -> the shape that the engine built of `graph` is tuned for; {} for engines that take a graph as it is.

    EngineError where none has been built that can be used here."""
    if name not in ("tensorrt-rtx", "tensorrt"):
        return {}
    backend = ENGINES[name]
    here = importlib.import_module(f".{backend.module}", __package__).here(backend.setting, gpu_index(device))
    plan = choose_plans(PlanStore(graph.parent.parent), graph, here, {})[0].plan
    return {name: best for name, (_, best, _) in plan.profile.items()}


def tiles_attention(name: str) -> bool:
    """Return whether `MultiHeadAttention` without a mask works in tiles on engine `name`, instead of writing all scores.

    onnxruntime's CPU provider does, in fp32, if the system reports a level 2 cache; glibc on many Arm systems reports 0.
    """
    key = "SC_LEVEL2_CACHE_SIZE"
    # Windows has neither, macOS no such key
    names, read = getattr(os, "sysconf_names", {}), getattr(os, "sysconf", None)
    return takes_attention_form(name) and (read is None or key not in names or read(key) > 0)


def can_run(name: str, precision: tuple[str, str]) -> bool:
    """Return whether engine `name` works here, and runs what was exported as `precision`. Imports it to find out."""
    return missing_here(name) is None and not refusal(name, precision) and _not_loaded(name) is None


def runs_on_cpu(name: str) -> bool:
    return name in _ON_CPU


def takes_attention_form(name: str) -> bool:
    """Return whether engine `name` runs `MultiHeadAttention` nodes of onnxruntime's own domain, com.microsoft.

    Every onnxruntime that this package allows has the kernels, for the CPU and for CUDA. The others need the plain graph.
    """
    return name in ("onnxruntime-cpu", "onnxruntime-cuda")


def _wrong_device(name: str, device: str | None) -> Missing | None:
    runs_on = "cpu" if runs_on_cpu(name) else "cuda"
    if device is None or device.startswith(runs_on):
        return None
    return Missing(f"it runs on {'the CPU' if runs_on == 'cpu' else 'an NVIDIA GPU'}, not on {device}", "")


def missing_here(name: str) -> Missing | None:
    """Why engine `name` can't be used here and what to do, as far as that is known without importing it."""
    backend = ENGINES[name]
    spec = importlib.util.find_spec(backend.package)
    if spec is None:
        return Missing(f"{backend.package} is not installed", install_line(backend.extra))
    if spec.origin is None:  # a folder without its __init__.py
        again = f"pip uninstall every {backend.package} package, then {install_line(backend.extra)}"
        return Missing(f"{backend.package} is installed in part: another package took files with it", again)
    if name in _PROVIDERS:
        built = any(Path(spec.origin).parent.glob(f"capi/*onnxruntime_providers_{_PROVIDERS[name][0]}*"))
        why = f"this onnxruntime was built without {_PROVIDERS[name][1]}"
        return _missing_gpu() if built else Missing(why, f"pip uninstall onnxruntime, then {install_line('cuda')}")
    return _missing_gpu() if name.startswith("tensorrt") else None


def _missing_plans(name: str, built: BuiltFor | None, gpu: int) -> Missing | None:
    if built is None:
        return Missing("it runs engines built of a bundle, and none was named", "")
    backend = ENGINES[name]
    module = importlib.import_module(f".{backend.module}", __package__)
    try:
        why = lacking(built, module.here(backend.setting, gpu))
    except EngineError as failure:
        why = str(failure)
    return Missing(why, "") if why else None


def _not_loaded(name: str) -> Missing | None:
    """Why a GPU's engine that is installed does not work after all. Imports it, and tries it."""
    backend = ENGINES[name]
    try:
        importlib.import_module(f".{backend.module}", __package__).device(backend.setting)
    except Exception as failure:  # a library that is installed in part raises anything: OSError, RuntimeError, ...
        return Missing(reason(failure), "")
    return None


def _missing_gpu() -> Missing | None:
    try:
        nvidia.devices()
    except EngineError as failure:
        return Missing(str(failure), "install NVIDIA's driver, or use another engine")
    return None


def install_line(extra: str) -> str:
    if extra == "tensorrt" and nvidia.JETSON.is_file():
        return 'pip install "vega-edge[jetson]" into a venv made with --system-site-packages, which sees JetPack\'s tensorrt'
    first = "tensorrt " if extra == "tensorrt" else ""  # an extra without it: its libraries are in NVIDIA's index
    return f'pip install {first}"vega-edge[{extra}]"'  # double quotes: cmd.exe knows no others
