"""A traced graph is simplified to what onnxscript's own optimizer makes of it, and is let go of."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="exports need onnxscript (the export extra)")

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnxscript import optimizer

from vega_edge.export.simplify import simplify


def _model() -> ir.Model:
    """No-ops of every kind, a constant chain, the same node twice, and a dead branch."""
    constants = {"one": 1.0, "zero": 0.0, "two": 2.0}
    nodes = [helper.make_node("Constant", [], [name], value_float=value) for name, value in constants.items()]
    nodes += [
        helper.make_node("Mul", ["one", "x"], ["a"]),
        helper.make_node("Add", ["a", "zero"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1]),
        helper.make_node("Cast", ["d"], ["e"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["two", "two"], ["four"]),
        helper.make_node("Mul", ["e", "four"], ["f"]),
        helper.make_node("Mul", ["e", "four"], ["g"]),
        helper.make_node("Sqrt", ["e"], ["dead"]),
        helper.make_node("Add", ["f", "g"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def test_as_the_optimizer_itself() -> None:
    ours, theirs = _model(), _model()
    simplify(ours)
    optimizer.optimize_ir(theirs)
    assert _bytes(ours) == _bytes(theirs)
    assert [node.op_type for node in ours.graph] == ["Mul", "Add"]
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    evaluated = onnx.reference.ReferenceEvaluator(ir.to_proto(ours)).run(None, {"x": x})
    np.testing.assert_array_equal(evaluated[0], 8 * x)


@pytest.mark.filterwarnings("error")
def test_the_graph_is_let_go_of() -> None:
    model = _model()
    simplify(model)
    gone = weakref.ref(next(iter(model.graph)))
    del model
    gc.collect()
    assert gone() is None
