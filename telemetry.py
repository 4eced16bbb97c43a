"""The telemetry of other libraries, switched off before they load."""

from __future__ import annotations

import os
import sys

OFF = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")  # of onnxruntime, and of huggingface_hub with diffusers


def switch_off() -> None:
    """Set the variables that onnxruntime and huggingface_hub read when they are imported. A value of the user's stays."""
    for name in OFF:
        if not os.environ.get(name):
            os.environ[name] = "1"


def import_openvino() -> None:
    """Import OpenVINO without openvino_telemetry, which has no switch: OpenVINO takes the stub that it brings along.

    A program's own `import openvino_telemetry`, before or after, is as always.
    """
    name = "openvino_telemetry"
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it is then an ImportError
    try:
        import openvino  # type: ignore[import, unused-ignore]  # noqa: F401
    finally:
        if hidden:
            del sys.modules[name]
