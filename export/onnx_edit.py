"""Edits of an exported graph, before and after it is written: clean, rename, store in half precision, append pixels.

Works on onnx_ir models; knows no torch, and of diffusion only how a decoder's output becomes pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import ExportError
from ..manifest import Parameter

WEIGHTS_FILE = "model.onnx_data"
_EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph, where every engine's shape inference reads them
_HALF_ELEMENTS = 64  # below this a Cast costs more than it saves
_PROBE = 16  # values compared first when looking for a weight by its content


def strip(model: ir.Model) -> None:
    """Remove what describes the exporting machine (source lines, stack traces) and the shapes of inner values."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs if value not in kept]
    for thing in (model, model.graph, *model.graph, *kept, *inner, *model.graph.initializers.values()):
        thing.metadata_props.clear()
        thing.doc_string = None
    for value in inner:  # engines infer these; the exporter's are full of its own symbols
        value.type = value.shape = None


def name_weights(
    model: ir.Model, weights: Mapping[str, NDArray[Any]], rename: Callable[[str], str]
) -> dict[str, Parameter]:
    """Give initializers the checkpoint's names (`rename`), and say where each of `weights` is stored.

    The exporter keeps a weight's name where the node takes it as it is (Conv, Gemm, Gather) and calls it `val_N` where
    it folded a Transpose; the latter are found by content and renamed. Weights of equal content share one initializer
    in the graph, and the orientation of a symmetric one can't be told: such weights are left out of the result, since
    patching one would be wrong. ExportError if a weight is not in the graph at all.
    """
    initializers = model.graph.initializers
    for name in list(initializers):
        initializers[name].name = rename(name)
    probes: dict[Any, list[ir.Value]] = {}
    for value in initializers.values():
        if value.const_value is not None and len(value.const_value.shape) in (2, 4):
            probes.setdefault(_probe(value.const_value.numpy()), []).append(value)
    owners: dict[str, list[tuple[str, bool]]] = {}
    ambiguous = set()
    for name, weight in weights.items():
        places = [(name, False)] if name in initializers else _places(weight, probes)
        if not places:
            raise ExportError(f"{name} is not in the graph that torch's exporter wrote; this version can't be exported")
        if len(places) > 1:
            ambiguous.add(name)
        owners.setdefault(places[0][0], []).append((name, places[0][1]))
    return _rename_to_owners(initializers, owners, ambiguous)


def store_half(model: ir.Model) -> None:
    """Store float32 initializers as float16 followed by a Cast, so that arithmetic stays float32.

    Only those which float16 holds exactly: rounding the checkpoint's weights is the caller's decision (and is done on
    the module before export), and a constant that is no weight, such as the frequencies of the timestep embedding,
    must not lose digits: at timestep 999 their rounding would turn the sinusoids by half a radian.
    """
    graph = model.graph
    first = next(iter(graph))
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size <= _HALF_ELEMENTS:
            continue
        array = tensor.numpy()
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        cast.outputs[0].name = f"{name}.float32"
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)
        value.const_value = ir.tensor(half, name=name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)


def save(model: ir.Model, path: Path) -> None:
    """Write the graph, and its larger initializers to `model.onnx_data` beside it (no 2 GB limit there)."""
    ir.save(model, path, external_data=WEIGHTS_FILE, size_threshold_bytes=_EXTERNAL_BYTES)


def save_pixels(decoder: Path, pixels: Path, config: Mapping[str, Any]) -> None:
    """From the written float decoder, write `pixels`: latents as the sampler has them -> uint8[batch, h, w, 3].

    The same arithmetic in the same order as diffusers (pipeline: latents / scaling_factor; VaeImageProcessor:
    (x * 0.5 + 0.5).clamp(0, 1), NHWC, (x * 255).round(), half to even). Shares the decoder's weights file.
    """
    model = ir.load(decoder)
    graph = model.graph
    scaled, image = graph.inputs[0], graph.outputs[0]
    first = next(iter(graph))
    latents = ir.Value(name=scaled.name, type=scaled.type, shape=scaled.shape)
    scaled.name, image.name = "scaled_latents", "image"
    graph.inputs[0] = latents
    head = _Chain(graph, "pixels_in", scaled.dtype)
    std, mean = config.get("latents_std"), config.get("latents_mean")
    shift = config.get("shift_factor")
    value = latents
    if std is not None and mean is not None:
        value = head.add("Mul", value, np.reshape(std, (1, -1, 1, 1)))
    value = head.add("Div", value, config["scaling_factor"])
    if std is not None and mean is not None:
        value = head.add("Add", value, np.reshape(mean, (1, -1, 1, 1)))
    if shift is not None:
        value = head.add("Add", value, shift)
    for node in head.nodes:
        graph.insert_before(first, node)
    scaled.replace_all_uses_with(value)

    tail = _Chain(graph, "pixels_out", image.dtype)
    value = tail.add("Add", tail.add("Mul", image, 0.5), 0.5)
    value = tail.add("Clip", value, 0.0, 1.0)
    value = tail.add("Transpose", value, perm=[0, 2, 3, 1])
    value = tail.add("Cast", value, to=ir.DataType.FLOAT)
    tail.dtype = ir.DataType.FLOAT
    value = tail.add("Round", tail.add("Mul", value, 255.0))
    value = tail.add("Cast", value, to=ir.DataType.UINT8)
    graph.extend(tail.nodes)
    batch, channels, height, width = image.shape or ir.Shape(())
    value.name, value.type = "pixels", ir.TensorType(ir.DataType.UINT8)
    value.shape = ir.Shape((batch, height, width, channels))
    graph.outputs[0] = value
    image.type = image.shape = None
    ir.save(model, pixels)


class _Chain:
    """New nodes, each with its constants of type `dtype`, named prefix_0, prefix_1, ..."""

    def __init__(self, graph: ir.Graph, prefix: str, dtype: ir.DataType | None) -> None:
        self.graph, self.dtype, self.nodes = graph, dtype or ir.DataType.FLOAT, list[ir.Node]()
        self._names = (f"{prefix}_{i}" for i in itertools.count())

    def add(self, op: str, value: ir.Value, *constants: Any, **attributes: Any) -> ir.Value:
        inputs = [value, *(self._constant(c) for c in constants)]
        node = ir.node(op, inputs, attributes=attributes)
        self.nodes.append(node)
        node.name = node.outputs[0].name = next(self._names)
        return node.outputs[0]

    def _constant(self, constant: Any) -> ir.Value:
        name = next(self._names)
        tensor = ir.tensor(np.asarray(constant, self.dtype.numpy()), name=name)
        value = ir.Value(name=name, type=ir.TensorType(self.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _probe(array: NDArray[Any]) -> Any:
    return array.shape, array.flat[:_PROBE].tobytes()


def _places(weight: NDArray[Any], probes: Mapping[Any, list[ir.Value]]) -> list[tuple[str, bool]]:
    """(initializer, transposed) for every initializer that holds this weight as it is or transposed."""
    return [
        (str(value.name), transposed)
        for candidate, transposed in ((weight.T, True), (weight, False))
        for value in probes.get(_probe(candidate), ())
        if value.const_value is not None and np.array_equal(value.const_value.numpy(), candidate)
    ]


def _rename_to_owners(
    initializers: Mapping[str, ir.Value], owners: Mapping[str, list[tuple[str, bool]]], ambiguous: set[str]
) -> dict[str, Parameter]:
    found = {}
    for initializer, names in owners.items():
        (name, transposed), *others = names
        if not others and name not in ambiguous:
            initializers[initializer].name = name
            found[name] = Parameter(name, transposed)
    return found
