"""A second graph beside an exported one, whose attention is one `MultiHeadAttention` node of onnxruntime's.

onnxruntime's kernels for that node never hold the matrix of all scores, which grows with the fourth power of a picture's
side: on its CPU provider attention takes a quarter of the time and, from 64x64 tokens on, a
twentieth of the memory or less (bench/attention.py). Other engines have no such node; they recognize attention in the
plain graph by themselves. Both graphs share one weights file, initializer for initializer, so a LoRA's map holds for
both. Works on onnx_ir models; knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..manifest import attention_form

DOMAIN = "com.microsoft"  # onnxruntime/docs/ContribOperators.md
_HEADS_FIRST = (0, 2, 1, 3)  # [batch, tokens, heads, width] -> [batch, heads, tokens, width], and back


class _Match(NamedTuple):
    """softmax(query @ key^T * scale) @ value for each of `heads`, with the node that gives it.

    query, key, value and the node's output are [batch, tokens, heads * width]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    result: ir.Node


def save_attention(graph: Path) -> Path | None:
    """Write the second graph beside `graph` and return its path; None if it has no attention of this form."""
    model = ir.load(graph)
    if not fuse(model):
        return None
    made = graph.with_name(attention_form(graph.name))
    ir.save(model, made)
    return made


def fuse(model: ir.Model) -> int:
    """Change `model` in place; return how many MultiHeadAttention nodes it has now. 0: nothing was changed."""
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node))]
    for query, key, value, heads, scale, result in found:
        node = ir.node(
            "MultiHeadAttention", [query, key, value], domain=DOMAIN, name=result.name,
            attributes={"num_heads": heads, "scale": scale},
        )  # fmt: skip
        made, old = node.outputs[0], result.outputs[0]
        made.type, made.shape = old.type, old.shape
        model.graph.insert_before(result, node)
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        made.name, old.name = old.name, None
    if found:
        RemoveUnusedNodesPass()(model)
        model.opset_imports[DOMAIN] = 1
    return len(found)


def _match(softmax: ir.Node) -> _Match | None:
    """Recognize what torch's exporter makes of scaled_dot_product_attention without a mask: query and key are each
    multiplied by the square root of the scale, and the key's last two axes are exchanged with the first two flattened."""
    logits = _made_by(softmax.inputs[0], "MatMul")
    product = _only_user(softmax.outputs[0], "MatMul")
    if logits is None or product is None:
        return None
    query, root = _scaled(logits.inputs[0])
    turned, same = _scaled(logits.inputs[1])
    rows = [_rows(query), _rows(_untransposed(turned)), _rows(product.inputs[1])]
    heads = {row[1] for row in rows if row is not None}
    result = _joined(product.outputs[0])
    if root is None or same is not root or root.const_value is None or None in rows or len(heads) != 1 or not result:
        return None
    query, key, value = (row[0] for row in rows if row is not None)
    scale = float(root.const_value.numpy().reshape(())) ** 2
    return _Match(query, key, value, heads.pop(), scale, result)


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


def _rows(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x [batch, tokens, heads * width], heads) of a value [batch, heads, tokens, width] that is made of x."""
    turn = _made_by(value, "Transpose")
    split = _made_by(turn and turn.inputs[0], "Reshape")
    if turn is None or split is None or _order(turn) != _HEADS_FIRST:
        return None
    x, sizes = split.inputs[0], _sizes(split)
    if x is None or (x.shape is not None and len(x.shape) != 3) or len(sizes) != 4 or sizes[2] < 1:
        return None
    return x, sizes[2]


def _joined(value: ir.Value) -> ir.Node | None:
    """The node that makes [batch, tokens, heads * width] of a value [batch, heads, tokens, width]."""
    turn = _only_user(value, "Transpose")
    join = turn and _only_user(turn.outputs[0], "Reshape")
    if turn is None or join is None or _order(turn) != _HEADS_FIRST or len(_sizes(join)) != 3:
        return None
    return join


def _sizes(reshape: ir.Node) -> list[int]:
    """The sizes that a Reshape asks for, -1 for each that is not known before it runs."""
    asked = reshape.inputs[1]
    if asked is None:
        return []
    if asked.const_value is not None:
        return [int(size) for size in asked.const_value.numpy()]
    parts = _made_by(asked, "Concat")
    if parts is None:
        return []
    known = [
        np.asarray(v.const_value.numpy()) if v is not None and v.const_value is not None else None for v in parts.inputs
    ]
    return [-1 if size is None else int(size[0]) for size in known if size is None or size.shape == (1,)]


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes["perm"].as_ints())


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _only_user(value: ir.Value, operator: str) -> ir.Node | None:
    """The node that takes `value`, if it is the only one, is of this kind, and takes it first."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1 or uses[0].node.op_type != operator or uses[0].idx != 0:
        return None
    return uses[0].node
