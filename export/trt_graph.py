"""The graph that a plan is built from, where that is not the bundle's own: weights replaced, or fewer bits.

Replaced weights (a LoRA's) are written over a copy of the files, at the place where each lies. int8 is of weights only:
each matrix product's right side is stored as int8 with a scale for each column, and arithmetic stays as it was. fp8 is
of both sides: E4M3 with one scale each (Micikevicius et al. 2022, arXiv:2209.05433), the left one's from calibration.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engines.plan_store import BUILD_PREFIX
from ..errors import EngineError, ExportError
from ..onnx_file import read_weights

_LEAST_ELEMENTS = 4096  # of a matrix that is worth fewer bits
_LEAST_SCALE = 6e-8  # fp16's least number above 0, to which half precision would round it
_INT8_MOST, _E4M3_MOST = 127.0, 448.0
_OPSET = 19  # the first whose QuantizeLinear has fp8
Ranges = Mapping[str, float]  # tensor -> largest absolute value seen


@contextlib.contextmanager
def prepared(
    graph: Path, weights: Mapping[str, NDArray[Any]], precision: str, folder: Path, ranges: Ranges | None = None
) -> Iterator[Path]:
    """The path to build from: `graph` itself, or a changed copy in a folder below `folder` that vanishes afterwards.

    weights: initializer -> values, in the dtype they are stored in. ranges: for fp8, of the matrix products' left sides.
    """
    if not weights and precision == "graph":
        yield graph
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder) as temporary:
        copy = Path(temporary) / graph.parent.name / graph.name
        try:
            _copy(graph, copy)
            if weights:
                _replace(copy, weights)
            del weights  # they are in the copy, and a build begins
            if precision != "graph":
                _quantize(copy, precision, ranges or {})
        except OSError as failure:
            raise EngineError(
                f"{folder}: {failure.strerror or failure}; free some space there: a copy of the weights is written"
            ) from failure
        yield copy


def _copy(graph: Path, copy: Path) -> None:
    copy.parent.mkdir()
    for file in sorted({graph, *(weight.file for weight in read_weights(graph).values())}):
        shutil.copyfile(file, copy.parent / file.relative_to(graph.parent))


def _replace(graph: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    places = read_weights(graph)
    for name, array in weights.items():
        if name not in places:
            raise EngineError(f"{graph.parent.name}/{graph.name} has no initializer {name!r} that could be replaced")
        with open(places[name].file, "r+b") as stream:
            stream.seek(places[name].offset)
            stream.write(np.ascontiguousarray(array).data)


def _quantize(graph: Path, precision: str, ranges: Ranges) -> None:
    try:
        import onnx
    except ImportError as failure:
        raise EngineError(
            f'{precision} needs onnx, not installed here: pip install "vega-edge[tensorrt-rtx]"'
        ) from failure
    model = onnx.load(graph)
    count = quantize_matrices(model, precision, ranges)
    if not count:
        raise ExportError(f"{graph.parent.name}/{graph.name} has no matrix product that {precision} could be used for")
    data = graph.with_name("quantized_data")
    onnx.save(
        model, graph, save_as_external_data=True, location=data.name, size_threshold=1024, convert_attribute=False
    )


def quantize_matrices(model: Any, precision: str, ranges: Ranges) -> int:
    """Changes an onnx model in place, its weights loaded; returns how many matrix products it changed."""
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    matrices, uses = _matrices(model), Counter(name for node in model.graph.node for name in node.input)
    nodes, casts, count = [], set(), 0
    for node in model.graph.node:
        matrix = matrices.get(node.input[1]) if node.op_type == "MatMul" else None
        shared = matrix is not None and uses[matrix.initializer] * uses[node.input[1]] > 1
        if matrix is None or shared or (precision == "fp8" and node.input[0] not in ranges):
            nodes.append(node)
            continue
        source = matrix.initializer
        values = numpy_helper.to_array(tensors[source])
        if matrix.dtype is not None:
            values = values.astype(helper.tensor_dtype_to_np_dtype(matrix.dtype))
            casts.add(node.input[1])
        make = _int8 if precision == "int8" else _fp8
        new, added = make(node, values, ranges)
        model.graph.initializer.remove(tensors.pop(source))
        model.graph.initializer.extend(added)
        nodes += new
        count += 1
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if node.op_type != "Cast" or node.output[0] not in casts)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, _OPSET)  # 18 to 19 changed no operator that a bundle's graph uses
    return count


def matrix_products(model: Any) -> list[Any]:
    """The nodes that multiply by an initializer which is a large enough matrix; `model` need not have its weights loaded."""
    matrices = _matrices(model)
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


class _Matrix(NamedTuple):
    """`dtype`: ONNX's number of what a Cast makes of the initializer, None where there is none."""

    initializer: str
    dtype: int | None = None


def _matrices(model: Any) -> dict[str, _Matrix]:
    """The initializers that are matrices large enough, under their own names and those of their Casts: a bundle's
    weights may be stored in half precision and computed with in full."""
    large = [t.name for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] * t.dims[1] >= _LEAST_ELEMENTS]
    found = {name: _Matrix(name) for name in large}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in found:
            (to,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
            found[node.output[0]] = _Matrix(node.input[0], to)
    return found


def _int8(node: Any, values: NDArray[Any], ranges: Ranges) -> tuple[list[Any], list[Any]]:
    from onnx import helper, numpy_helper

    name = node.input[1]
    scale = int8_scale(values)
    rounded = np.rint(values.astype(np.float32) / scale.astype(np.float32)).clip(-_INT8_MOST, _INT8_MOST)
    arrays = {
        f"{name}.int8": rounded.astype(np.int8),
        f"{name}.scale": scale,
        f"{name}.zero": np.zeros(scale.shape, np.int8),
    }
    restore = helper.make_node("DequantizeLinear", list(arrays), [f"{name}.restored"], name=f"{name}.restore", axis=1)
    node.input[1] = restore.output[0]
    return [restore, node], [numpy_helper.from_array(array, key) for key, array in arrays.items()]


def int8_scale(matrix: NDArray[Any]) -> NDArray[Any]:
    """One for each column, such that its largest value is 127; in the matrix's dtype, where it is never 0."""
    largest = np.abs(matrix.astype(np.float32)).max(0) / _INT8_MOST
    scale = np.where(largest > 0, largest, 1).astype(matrix.dtype)
    return np.maximum(scale, matrix.dtype.type(_LEAST_SCALE))


def _fp8(node: Any, values: NDArray[Any], ranges: Ranges) -> tuple[list[Any], list[Any]]:
    import onnx
    from onnx import helper, numpy_helper

    left, right = node.input[0], node.input[1]
    scales = {left: ranges[left] / _E4M3_MOST, right: float(np.abs(values).max()) / _E4M3_MOST}
    prefix, added, names = node.name or node.output[0], [], {}
    for i, (tensor, scale) in enumerate(scales.items()):
        names[tensor] = f"{prefix}.fp8_{i}"
        added.append(numpy_helper.from_array(np.asarray(scale or 1.0, values.dtype), f"{names[tensor]}.scale"))
        added.append(helper.make_tensor(f"{names[tensor]}.zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    import ml_dtypes  # onnx's own dependency for the types that numpy lacks

    stored = (values.astype(np.float32) / (scales[right] or 1.0)).astype(ml_dtypes.float8_e4m3fn)
    weight = helper.make_tensor(
        f"{names[right]}.weight", onnx.TensorProto.FLOAT8E4M3FN, values.shape, stored.tobytes(), raw=True
    )
    nodes = []
    for tensor, source in ((left, None), (right, weight.name)):
        scale, zero, at = f"{names[tensor]}.scale", f"{names[tensor]}.zero", source
        if at is None:
            at = f"{names[tensor]}.quantized"
            nodes.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [at], name=at))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [at, scale, zero], [f"{names[tensor]}.restored"], name=f"{names[tensor]}.restore"
            )
        )
    node.input[0], node.input[1] = (f"{names[tensor]}.restored" for tensor in (left, right))
    return [*nodes, node], [*added, weight]
