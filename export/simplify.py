"""A traced graph without what does nothing: constants folded, no-ops removed, equal nodes made one.

The passes of `onnxscript.optimizer.optimize`, in its order, and those of its rules that a diffusion network's graph can
meet. Its rule for slices that split an axis compares each node with all others, which for a U-Net of 2,000 nodes takes
longer than all else together and finds nothing.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

_ROUNDS = 2  # folding shows what rules can remove, and the other way round
_NO_OPS = rewriter.RewriteRuleSet([rules.mul_by_1_rule, rules.add_0_rule], commute=True)
_RULES = rewriter.RewriteRuleSet(
    [
        *_NO_OPS.rules,
        rules.sub_0_rule,
        rules.div_by_1_rule,
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
    ]
)


def simplify(model: ir.Model) -> None:
    """In place."""
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        removed = _RULES.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or removed):
            break
    _RULES.apply_to_model(_another())
    for last in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)


def _another() -> ir.Model:
    """One node. A rule keeps the last graph that it was tried on: with its weights, it would outlive its export."""
    node = ir.node("Identity", [ir.val("x")])
    return ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 18}), ir_version=10)
