"""A second graph beside an exported one, whose attention is one ONNX `Attention` node (opset 23) instead of five.

For onnxruntime's CUDA provider, whose kernels for that node never hold the matrix of all logits; on its CPU the node is no
faster (bench/attention.py), and TensorRT-RTX refuses it in fp32, so everything else takes the decomposed graph. Both
share one weights file, initializer for initializer, so a LoRA's map holds for both. Works on onnx_ir models; knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..manifest import attention_form

OPSET, IR_VERSION = 23, 11  # the first with Attention
_HEADS_FIRST = (0, 2, 1, 3)  # [batch, tokens, heads, width] -> [batch, heads, tokens, width]


class _Match(NamedTuple):
    """softmax(query @ key^T * scale) @ value, with the node that gives it."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    product: ir.Node


def save_attention(graph: Path) -> Path | None:
    """Writes the second graph beside `graph` and returns its path; None where no attention of this form is in it."""
    model = ir.load(graph)
    if not fuse(model):
        return None
    made = graph.with_name(attention_form(graph.name))
    ir.save(model, made)
    return made


def fuse(model: ir.Model) -> int:
    """Changes `model` in place; returns how many Attention nodes it has now. 0: nothing was changed."""
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node))]
    for query, key, value, scale, product in found:
        node = ir.node("Attention", [query, key, value], attributes={"scale": scale}, name=product.name)
        result, old = node.outputs[0], product.outputs[0]
        model.graph.insert_before(product, node)
        old.replace_all_uses_with(result)
        result.name, old.name = old.name, None
    if found:
        RemoveUnusedNodesPass()(model)
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    return len(found)


def _match(softmax: ir.Node) -> _Match | None:
    """What torch's exporter makes of scaled_dot_product_attention without a mask: query and key are each multiplied by
    the square root of the scale, and the key's last two axes are exchanged with the first two flattened."""
    logits = _made_by(softmax.inputs[0], "MatMul")
    uses = softmax.outputs[0].uses()
    if logits is None or len(uses) != 1 or uses[0].node.op_type != "MatMul" or uses[0].idx != 0:
        return None
    query, root = _scaled(logits.inputs[0])
    turned, same = _scaled(logits.inputs[1])
    key = _untransposed(turned)
    value = uses[0].node.inputs[1]
    if root is None or same is not root or not all(map(_heads_first, (query, key, value))):
        return None
    assert query is not None and key is not None and value is not None and root.const_value is not None
    return _Match(query, key, value, float(root.const_value.numpy().reshape(())) ** 2, uses[0].node)


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """(x, c) of x * c, c being one number."""
    node = _made_by(value, "Mul")
    if node is None:
        return None, None
    x, c = node.inputs
    return (x, c) if c is not None and c.const_value is not None and c.const_value.size == 1 else (None, None)


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    back = _made_by(value, "Reshape")
    turn = _made_by(back and back.inputs[0], "Transpose")
    flat = _made_by(turn and turn.inputs[0], "Reshape")
    return flat.inputs[0] if turn is not None and flat is not None and _order(turn) == (0, 2, 1) else None


def _heads_first(value: ir.Value | None) -> bool:
    node = _made_by(value, "Transpose")
    return node is not None and _order(node) == _HEADS_FIRST


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes["perm"].as_ints())


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None
