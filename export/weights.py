"""Weights into a traced graph: each as it is stored, with the nodes that turn it into what the arithmetic takes.

The graph was traced without numbers, its parameters being inputs; here they become initializers with the checkpoint's
names, whose bytes are made one at a time while the file is written. Knows onnx_ir and `Stored`; no module, no tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ..manifest import Parameter
from .packed import Stored

ARITHMETIC = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_TORCH = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16,
}  # fmt: skip
_ELEMENTS = 64  # below this a Cast costs more than it saves


@dataclass
class Placed:
    """What `place` did. parameters: where a LoRA finds its weights (none in eight bits). consumers: the nodes that
    multiply by an eight-bit weight, by that weight's name in the module, for activations to be made integer too."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    consumers: dict[str, list[ir.Node]] = field(default_factory=dict)


def place(
    model: ir.Model,
    values: Mapping[str, ir.Value],
    stored: Mapping[str, Stored],
    arithmetic: str,
    *,
    published: Callable[[str], str],
    mapped: Collection[str] = (),
) -> Placed:
    """Make each graph input of `values` (by the parameter's name) an initializer with the numbers of `stored`.

    published: the name the checkpoint's files give a parameter. mapped: parameters that go into the map. A weight that
    the graph only takes transposed is stored transposed, since engines would otherwise do that whenever they open it.
    """
    done = Placed()
    writer = _Writer(model.graph, ARITHMETIC[arithmetic])
    for name, value in values.items():
        model.graph.inputs.remove(value)
        uses = list(value.uses())
        turned = [use.node for use in uses if use.node.op_type == "Transpose" and value.shape and len(value.shape) == 2]
        straight = [(use.node, use.idx) for use in uses if use.node not in turned]
        forms = [(False, straight)] if straight else []
        if turned:
            forms.append((True, [use for node in turned for use in _uses(node.outputs[0])]))
        for transposed, users in forms:
            label = published(name) + (".transposed" if len(forms) > 1 and transposed else "")
            writer.write(label, stored[name], transposed, users)
            if stored[name].scale is not None:
                done.consumers.setdefault(name, []).extend(node for node, _ in users)
            elif name in mapped and len(forms) == 1:
                done.parameters[label] = Parameter(label, transposed)
        for node in turned:
            model.graph.remove(node, safe=True)
    return done


class _Writer:
    """Adds initializers to a graph, each with the nodes that make the arithmetic's type of it."""

    def __init__(self, graph: ir.Graph, arithmetic: ir.DataType) -> None:
        self.graph, self.arithmetic = graph, arithmetic

    def write(self, name: str, weight: Stored, transposed: bool, users: Iterable[tuple[ir.Node, int]]) -> None:
        data = weight.data
        if weight.scale is None:
            small = data.numel() <= _ELEMENTS
            made = self._initializer(name, data, transposed, _TORCH[self.arithmetic] if small else None)
            self._replace(users, self._cast(made))
            return
        table = [use for use in users if use[0].op_type == "Gather"]
        others = [use for use in users if use[0].op_type != "Gather"]
        made = self._initializer(name, data, transposed)
        if others:
            scale = self._initializer(f"{name}.scale", weight.scale)
            self._replace(others, self._cast(self._dequantized(made, scale, axis=int(transposed))))
        if table:
            rows = self._initializer(f"{name}.row_scale", weight.scale[:, None])
            for node, _ in table:
                self._gather(node, made, rows)

    def _initializer(
        self, name: str, data: torch.Tensor, transposed: bool = False, dtype: torch.dtype | None = None
    ) -> ir.Value:
        shape = tuple(reversed(data.shape)) if transposed else tuple(data.shape)
        kind = TorchTensor(torch.empty(0, dtype=dtype or data.dtype)).dtype
        tensor = ir.LazyTensor(partial(_tensor, data, transposed, dtype, name), kind, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _dequantized(self, value: ir.Value, scale: ir.Value, axis: int) -> ir.Value:
        return self._node("DequantizeLinear", [value, scale], f"{value.name}.float32", axis=axis)

    def _cast(self, value: ir.Value) -> ir.Value:
        kind = value.dtype or ir.DataType.FLOAT  # of a node of ours, which gives float32
        if kind == self.arithmetic:
            return value
        return self._node("Cast", [value], f"{value.name}.cast", to=self.arithmetic)

    def _gather(self, node: ir.Node, table: ir.Value, scales: ir.Value) -> None:
        """Rows are looked up before they are widened: a vocabulary is large, a prompt has 77 tokens."""
        ids, label = node.inputs[1], str(table.name)
        rows = [ir.node("Gather", [source, ids], attributes={"axis": 0}) for source in (table, scales)]
        wide = [
            ir.node("Cast", [rows[0].outputs[0]], attributes={"to": self.arithmetic}),
            ir.node("Cast", [rows[1].outputs[0]], attributes={"to": self.arithmetic}),
        ]
        product = ir.node("Mul", [wide[0].outputs[0], wide[1].outputs[0]])
        for i, new in enumerate((*rows, *wide, product)):
            new.name = new.outputs[0].name = f"{label}.rows_{i}"
            self.graph.insert_before(node, new)
        node.outputs[0].replace_all_uses_with(product.outputs[0])
        self.graph.remove(node, safe=True)

    def _node(self, op: str, inputs: list[ir.Value], output: str, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=output)
        node.outputs[0].name = output
        producer = inputs[0].producer()
        if producer is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    @staticmethod
    def _replace(users: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
        for node, index in users:
            node.replace_input_with(index, value)


def _tensor(data: torch.Tensor, transposed: bool, dtype: torch.dtype | None, name: str) -> TorchTensor:
    made = data.T if transposed else data
    return TorchTensor((made if dtype is None else made.to(dtype)).contiguous(), name)


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]
