"""Which exported precision runs on which engine: one table, asked before a bundle is opened and printed in the docs.

python -m vega_edge.engines.dtypes      # writes docs/dtypes.md's table to stdout
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import EngineError

# (dtype, weights) as a manifest says them, and what an export in it is for
PRECISIONS: Mapping[tuple[str, str], str] = {
    ("fp32", "fp32"): "reference",
    ("fp32", "fp16"): "half the file, full arithmetic",
    ("fp32", "bf16"): "half the file, full arithmetic; weights beyond fp16's range",
    ("fp32", "int8"): "a quarter of the file, full arithmetic",
    ("fp16", "fp16"): "GPUs",
    ("fp16", "int8"): "GPUs with little memory",
    ("bf16", "bf16"): "GPUs and CPUs with bf16 units; the range of fp32",
    ("int8", "int8"): "integer units: the U-Net's products and convolutions",
}

YES, UNTRIED = "yes", "not tried"
_NO_CONVOLUTION = "onnxruntime has no bf16 convolution on a CPU"
_NO_SUCH = "onnxruntime-cuda has no integer convolution"
_ALL = dict.fromkeys(PRECISIONS, YES)
# engine -> precision -> "yes", "not tried" (opened, at the user's risk), or why not
TABLE: Mapping[str, Mapping[tuple[str, str], str]] = {
    "onnxruntime-cpu": _ALL | {("bf16", "bf16"): _NO_CONVOLUTION},
    "onnxruntime-cuda": dict.fromkeys(PRECISIONS, UNTRIED) | {("int8", "int8"): _NO_SUCH},
    "onnxruntime-tensorrt": dict.fromkeys(PRECISIONS, UNTRIED),
    "tensorrt": dict.fromkeys(PRECISIONS, UNTRIED),
    "tensorrt-rtx": dict.fromkeys(PRECISIONS, UNTRIED),  # it builds fp32 and fp16 graphs; no GPU has run them
    "openvino": _ALL,
    "openvino-bf16": _ALL,
}


def refusal(engine: str, precision: tuple[str, str]) -> str:
    """Why `engine` can't run what was exported as `precision` = (dtype, weights); '' if it can, or nobody tried."""
    said = TABLE.get(engine, {}).get(precision, YES)
    return "" if said in (YES, UNTRIED) else said


def check_dtype(engine: str, dtype: str, weights: str) -> None:
    """Raises EngineError, naming engine and precision, if `engine` can't run what was exported so.

    An engine that the table does not name is not judged.
    """
    why = refusal(engine, (dtype, weights))
    if not why:
        return
    able = [name for name, row in TABLE.items() if row[dtype, weights] == YES]
    raise EngineError(
        f"engine {engine} can't run a bundle of dtype {dtype}: {why}; use {' or '.join(able)}, or export it with another dtype"
    )


def render() -> str:
    """The table as Markdown, engines in the order of `choice.ENGINES`."""
    head = ["`--dtype`", "`--weights`", "for", *(f"`{name}`" for name in TABLE)]
    rows = [head, ["---"] * len(head)]
    for (dtype, weights), purpose in PRECISIONS.items():
        cells = [TABLE[name][dtype, weights] for name in TABLE]
        rows.append([dtype, weights, purpose, *(c if c in (YES, UNTRIED) else f"no: {c}" for c in cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(render())
