"""How large the left sides of a graph's matrix products get on real inputs: what fp8 is scaled by. Runs on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .trt_graph import matrix_products

_PREFIX = "largest of "
_FOLDER = "session.model_external_initializers_file_folder_path"  # where a graph given as bytes finds its weights


def largest_values(graph: Path, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """Tensor -> largest absolute value over `feeds`, which are the graph's own inputs. Needs onnx and onnxruntime.

    Memory is that of one run in onnxruntime: each tensor is reduced to one number inside the graph.
    """
    try:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper
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
    options.add_session_config_entry(_FOLDER, str(graph.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, 0.0)
    for given in feeds:
        for name, value in zip(names, session.run([_PREFIX + name for name in names], dict(given)), strict=True):
            found[name] = max(found[name], float(value))
    if bad := [name for name, value in found.items() if not np.isfinite(value)]:
        raise EngineError(
            f"{graph.parent.name}/{graph.name}: {bad[0]} is not finite on calibration inputs; fp8 can't be scaled: use int8"
        )
    return found
