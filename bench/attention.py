"""Attention in one node against attention in five: seconds and memory of the same layer on onnxruntime, taking turns.

    python -m vega_edge.bench.attention [--engine onnxruntime-cpu] -o benchmarks/results/attention.json

The layers are self-attention of Vega's U-Net at 1024 px and of SD's at 512 px, float32, random numbers. Each is opened in
a process of its own for memory (peak beyond what is resident once it is open), and both in one for time; ratios are of
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .machine import facts, markdown

LAYERS = {
    "Vega, 64x64": (4096, 10, 64),
    "Vega, 32x32": (1024, 20, 64),
    "SD, 64x64": (4096, 8, 40),
}  # tokens, heads, width
FORMS = ("decomposed", "MultiHeadAttention")


def make(tokens: int, heads: int, width: int, folder: Path) -> dict[str, Path]:
    """q, k, v [1, tokens, heads * width] -> y, as torch's exporter writes it, and its attention form."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from ..export.attention import save_attention

    steps: list[tuple[str, list[str], str, dict[str, Any]]]
    steps = [("Mul", ["q.heads", "root"], "q.scaled", {}), ("Reshape", ["k.heads", "flat"], "k.flat", {})]
    steps += [
        ("Transpose", ["k.flat"], "k.turned", {"perm": [0, 2, 1]}),
        ("Reshape", ["k.turned", "back"], "k.back", {}),
    ]
    steps += [("Mul", ["k.back", "root"], "k.scaled", {}), ("MatMul", ["q.scaled", "k.scaled"], "logits", {})]
    steps += [("Softmax", ["logits"], "weights", {"axis": -1}), ("MatMul", ["weights", "v.heads"], "o", {})]
    steps += [("Transpose", ["o"], "o.turned", {"perm": [0, 2, 1, 3]}), ("Reshape", ["o.turned", "joined"], "y", {})]
    for x in "vkq":
        turn = ("Transpose", [f"{x}.split"], f"{x}.heads", {"perm": [0, 2, 1, 3]})
        steps = [("Reshape", [x, "split"], f"{x}.split", {}), turn, *steps]
    shapes = {"split": [1, tokens, heads, width], "flat": [heads, tokens, width], "back": [1, heads, width, tokens]}
    constants = {name: np.array(shape) for name, shape in {**shapes, "joined": [1, tokens, heads * width]}.items()}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([width**-0.25], np.float32), "root"))
    value = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, tokens, heads * width]) for x in "qkvy"]
    nodes = [helper.make_node(operator, takes, [gives], **more) for operator, takes, gives, more in steps]
    graph = helper.make_graph(nodes, "attention", value[:3], value[3:], initializers)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    made = save_attention(path)
    assert made is not None
    return dict(zip(FORMS, (path, made), strict=True))


def feeds(tokens: int, heads: int, width: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {x: draw.standard_normal((1, tokens, heads * width)).astype(np.float32) for x in "qkv"}


def memory_mb(graph: Path, layer: str, engine: str) -> float:
    command = [sys.executable, "-m", "vega_edge.bench.attention", "--one", str(graph), layer, "--engine", engine]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one(graph: Path, layer: str, engine: str) -> float:
    from ..engines import open_engine

    opened, given = open_engine(graph, engine), feeds(*LAYERS[layer])
    before = status_mb("VmRSS")
    opened.run(given)
    return status_mb("VmHWM") - before


def status_mb(key: str) -> float:
    """A number of this process's memory, in MB, from Linux's /proc. Not getrusage's peak: that begins at the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise SystemExit("this measurement needs Linux: memory is read from /proc/self/status") from None
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def measure(layer: str, engine: str, runs: int) -> dict[str, Any]:
    from ..engines import open_engine

    with tempfile.TemporaryDirectory() as folder:
        graphs = make(*LAYERS[layer], Path(folder))
        opened = {form: open_engine(graph, engine) for form, graph in graphs.items()}
        given, taken, outputs = feeds(*LAYERS[layer]), {form: list[float]() for form in FORMS}, dict[str, Any]()
        for _ in range(runs + 1):  # the first is for warming up
            for form in FORMS:
                start = time.perf_counter()
                outputs[form] = opened[form].run(given)["y"]
                taken[form].append(time.perf_counter() - start)
        memory = {form: memory_mb(graph, layer, engine) for form, graph in graphs.items()}
    seconds = {form: statistics.median(each[1:]) for form, each in taken.items()}
    plain, fused = (outputs[form].astype(np.float64) for form in FORMS)
    return {
        "layer": layer, "seconds": seconds, "ratio": round(seconds["decomposed"] / seconds["MultiHeadAttention"], 3),
        "memory_mb": memory, "difference": float(np.abs(plain - fused).max() / np.abs(plain).max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in this process
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(one(Path(arguments.one[0]), arguments.one[1], arguments.engine))
        return
    rows = [measure(layer, arguments.engine, arguments.runs) for layer in LAYERS]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {**facts(), "engine": arguments.engine, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = (
        "layer",
        *(f"{form}, s" for form in FORMS),
        "times as fast",
        *(f"{form}, MB" for form in FORMS),
        "difference",
    )
    print(
        markdown(
            head,
            [
                (r["layer"], *(f"{s:.3f}" for s in r["seconds"].values()), r["ratio"],
                 *(f"{m:.0f}" for m in r["memory_mb"].values()), f"{r['difference']:.1e}")
                for r in rows
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
