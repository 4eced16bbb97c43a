"""Edits of an exported graph, before and after it is written: clean, float ends, append pixels.

Works on onnx_ir models; knows no torch, and of diffusion only how a decoder's output becomes pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

WEIGHTS_FILE = "model.onnx_data"
_EXTERNAL_BYTES = 1024  # tensors up to this size stay in the graph, where every engine's shape inference reads them


def strip(model: ir.Model) -> None:
    """Remove what describes the exporting machine (source lines, stack traces) and the shapes of inner values."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs if value not in kept]
    for thing in (model, model.graph, *model.graph, *kept, *inner, *model.graph.initializers.values()):
        thing.metadata_props.clear()
        thing.doc_string = None
    for value in inner:  # engines infer these; the exporter's are full of its own symbols
        value.type = value.shape = None


def float_ends(model: ir.Model) -> None:
    """Make bfloat16 inputs and outputs float32, cast inside the graph: numpy has no bfloat16."""
    graph = model.graph
    first = next(iter(graph))
    for index, inner in enumerate(list(graph.inputs)):
        if inner.dtype == ir.DataType.BFLOAT16:
            outer = ir.Value(name=inner.name, type=ir.TensorType(ir.DataType.FLOAT), shape=inner.shape)
            graph.inputs[index] = outer
            cast = ir.node("Cast", [outer], attributes={"to": ir.DataType.BFLOAT16}, name=f"{inner.name}.bf16")
            cast.outputs[0].name = inner.name = f"{inner.name}.bf16"
            inner.replace_all_uses_with(cast.outputs[0])
            graph.insert_before(first, cast)
    for index, inner in enumerate(list(graph.outputs)):
        if inner.dtype == ir.DataType.BFLOAT16:
            cast = ir.node("Cast", [inner], attributes={"to": ir.DataType.FLOAT}, name=f"{inner.name}.float32")
            outer = cast.outputs[0]
            outer.name, inner.name = inner.name, f"{inner.name}.bf16"
            outer.type, outer.shape = ir.TensorType(ir.DataType.FLOAT), inner.shape
            graph.append(cast)
            graph.outputs[index] = outer
            inner.shape = None


def save(model: ir.Model, path: Path) -> None:
    """Write the graph, and its larger initializers to `model.onnx_data` beside it (no 2 GB limit there)."""
    for value in model.graph.initializers.values():
        value.type = value.shape = None  # the tensors say them; a graph of eight-bit weights would grow by a tenth
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
    value = latents
    if std is not None and mean is not None:
        value = head.add("Mul", value, np.reshape(std, (1, -1, 1, 1)))
    value = head.add("Div", value, config["scaling_factor"])
    if std is not None and mean is not None:
        value = head.add("Add", value, np.reshape(mean, (1, -1, 1, 1)))
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


def save_with_late_weights(graph: Path, copy: Path) -> None:
    """A copy of the graph, on the same weights file, whose weights pass through an Identity before each node that takes
    them. What an engine makes of a weight it then makes after that, and not for all weights before the first node."""
    model = ir.load(graph)
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.const_value is None:
                continue
            if value.const_value.nbytes >= _EXTERNAL_BYTES:
                late = ir.node("Identity", [value])
                model.graph.insert_before(node, late)
                node.replace_input_with(index, late.outputs[0])
    ir.save(model, copy)


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
