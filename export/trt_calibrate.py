"""How large the left sides of a graph's matrix products get on real inputs: what fp8 is scaled by. Runs on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .trt_graph import matrix_products

_PREFIX = "largest of "
_FOLDER = "session.model_external_initializers_file_folder_path"  # where a graph given as bytes finds its weights


class Measured:
    """A graph as an Engine, whose runs are measured too. Needs onnx and onnxruntime.

    Memory is that of one run in onnxruntime: each tensor is reduced to one number inside the graph.
    """

    def __init__(self, graph: Path) -> None:
        try:
            import onnx
            import onnxruntime as ort
            from onnx import TensorProto, helper

            from ..engines.onnxruntime import OnnxRuntimeEngine
        except ImportError as failure:
            raise EngineError(
                f'fp8 needs {failure.name} to calibrate, not installed here: pip install "vega-edge[cpu]"'
            ) from failure
        model = onnx.load(graph, load_external_data=False)
        names = sorted({node.input[0] for node in matrix_products(model)})
        for i, name in enumerate(names):
            chain = [
                ("Abs", name, {}),
                ("ReduceMax", f"calibrate_{i}_0", {"keepdims": 0}),
                ("Cast", f"calibrate_{i}_1", {"to": TensorProto.FLOAT}),
            ]
            for k, (operator, source, attributes) in enumerate(chain):
                target = _PREFIX + name if k == len(chain) - 1 else f"calibrate_{i}_{k}"
                model.graph.node.append(helper.make_node(operator, [source], [target], **attributes))
            model.graph.output.append(helper.make_tensor_value_info(_PREFIX + name, TensorProto.FLOAT, []))
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = False  # it would keep what the largest layers needed, each anew
        options.add_session_config_entry(_FOLDER, str(graph.parent))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._graph, self._engine = graph, OnnxRuntimeEngine(session, arena=False)
        self._largest = dict.fromkeys(names, 0.0)
        self.inputs = self._engine.inputs
        self.outputs = {name: spec for name, spec in self._engine.outputs.items() if not name.startswith(_PREFIX)}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = self._engine.run(feeds)
        for name, before in self._largest.items():
            self._largest[name] = float(np.maximum(before, given.pop(_PREFIX + name)))  # NaN stays
        return given

    def close(self) -> None:
        self._engine.close()

    def largest(self) -> dict[str, float]:
        """Tensor -> largest absolute value over all runs. EngineError where it is infinite or no number."""
        if bad := [name for name, value in self._largest.items() if not np.isfinite(value)]:
            raise EngineError(
                f"{self._graph.parent.name}/{self._graph.name}: {bad[0]} is not finite on calibration inputs; fp8 can't be "
                "scaled: use int8"
            )
        return dict(self._largest)
