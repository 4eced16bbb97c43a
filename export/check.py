"""Is an exported part what torch computes? One table of tolerances, one measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines import Spec, open_engine
from ..engines.onnxruntime import DTYPES
from ..errors import ExportError
from .onnx_edit import save_with_late_weights

Arrays = Mapping[str, NDArray[Any]]

BF16_ENGINE = "openvino"  # onnxruntime's CPU has no bfloat16 convolution
# By the arithmetic. Largest difference from torch in float32 with the same (stored) weights, relative to the largest
# value of the output.
# A wrong weight, a transposed matrix or a lost digit of the timestep's sinusoids shows as 1e-2 or more.
TOLERANCES = {
    ("text_encoder", "fp32"): 5e-5,  # sums in another order over up to 32 layers; measured 1e-6
    ("unet", "fp32"): 2e-4,  # deeper, and GroupNorm over few values amplifies; measured 2e-6
    ("vae_decoder", "fp32"): 2e-4,  # as above
    ("text_encoder", "fp16"): 1e-2,  # eleven bits, a few layers deep; measured 1e-3
    ("unet", "fp16"): 3e-2,  # eleven bits, and attention logits in the thousands; measured 2e-3
    ("vae_decoder", "fp16"): 3e-2,  # as above
    ("text_encoder", "bf16"): 6e-2,  # eight bits: eight times fp16's
    ("unet", "bf16"): 2e-1,
    ("vae_decoder", "bf16"): 2e-1,
    ("unet", "int8"): 5e-1,  # a defect gives 1 or more; whether the picture suffers, bench/meaning says
}
_KIND = {"text_encoder_2": "text_encoder", "vae_encoder": "vae_decoder", "tiny_vae_decoder": "vae_decoder"}
# Pixels: a value that lies on the edge between two levels falls to either side when its last digits differ.
PIXEL_LEVELS = {"fp32": 1, "fp16": 8, "bf16": 51}  # of 255; the tolerances above, of the range


def tolerance(part: str, dtype: str) -> float:
    return TOLERANCES[_KIND.get(part, part), dtype]


def compare(part: str, graph: Path, dtype: str, cases: Sequence[tuple[Arrays, Arrays]]) -> float:
    """Run the graph on each case's feeds and compare with its reference. Returns the largest relative error.

    ExportError if an output is not finite, has another shape, or differs by more than the part's tolerance.
    """
    worst = 0.0
    for got, wanted in _run(graph, dtype, cases):
        for name, reference in wanted.items():
            worst = max(worst, relative_error(part, name, got[name], reference))
    allowed = tolerance(part, dtype)
    if worst > allowed:
        raise ExportError(
            f"{part}: differs from torch by {worst:.1e} of the largest value in {dtype}, allowed is {allowed:.0e}; "
            + ("this is a defect of the export: please report it" if dtype == "fp32" else "export it with dtype fp32")
        )
    return worst


def compare_pixels(part: str, graph: Path, dtype: str, cases: Sequence[tuple[Arrays, Arrays]]) -> int:
    """As `compare`, for uint8 pixels. Returns the largest difference in levels."""
    worst = 0
    for got, wanted in _run(graph, dtype, cases):
        pixels, reference = got["pixels"], wanted["pixels"]
        if pixels.shape != reference.shape or pixels.dtype != np.uint8:
            raise ExportError(
                f"{part}: pixels are {pixels.dtype}{list(pixels.shape)}, expected uint8{list(reference.shape)}"
            )
        worst = max(worst, int(np.abs(pixels.astype(int) - reference).max()))
    if worst > PIXEL_LEVELS[dtype]:
        raise ExportError(
            f"{part}: pixels differ from torch's by {worst} levels in {dtype}, allowed is {PIXEL_LEVELS[dtype]}"
        )
    return worst


def relative_error(part: str, name: str, got: NDArray[Any], reference: NDArray[Any]) -> float:
    if got.shape != reference.shape:
        raise ExportError(f"{part}: {name} has shape {list(got.shape)}, torch's has {list(reference.shape)}")
    if not (np.isfinite(got).all() and np.isfinite(reference).all()):
        raise ExportError(f"{part}: {name} is not finite (overflow); check the weights, or export with dtype fp32")
    difference = np.abs(got.astype(np.float64) - reference.astype(np.float64)).max()
    return float(difference / max(float(np.abs(reference).max()), 1e-12))


def _run(graph: Path, dtype: str, cases: Sequence[tuple[Arrays, Arrays]]) -> list[tuple[Arrays, Arrays]]:
    engine = open_engine(graph, BF16_ENGINE) if dtype == "bf16" else _LeanSession(graph)
    try:
        return [
            (engine.run({k: v.astype(engine.inputs[k].dtype) for k, v in feeds.items()}), wanted)
            for feeds, wanted in cases
        ]
    finally:
        engine.close()  # on Windows an open file can't be moved


class _LeanSession:
    """onnxruntime's CPU without what costs memory: a graph of n bytes of weights is run in little more than n.

    As it is opened for users, it holds a second, rearranged copy of the weights, and a third in float32 where they are
    half precision, which its CPU kernels lack. Here each node's weights are cast when the node runs.
    """

    def __init__(self, graph: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order of the file
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        copy = graph.with_name("checked.onnx")
        try:
            save_with_late_weights(graph, copy)
            self._session = ort.InferenceSession(copy, options, providers=["CPUExecutionProvider"])
        finally:
            copy.unlink(missing_ok=True)
        self.inputs = {node.name: Spec(DTYPES[node.type], tuple(node.shape)) for node in self._session.get_inputs()}

    def run(self, feeds: Arrays) -> Arrays:
        names = [node.name for node in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None
