"""What an export opens before it is done: each graph, on each engine here that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vega_edge.engines import missing_here, open_engine
from vega_edge.errors import EngineError, ExportError
from vega_edge.export import export_bundle, openings
from vega_edge.export.openings import check_opens, engines_for
from vega_edge.export.precision import Precision

FP32, BF16 = Precision("fp32", "fp32"), Precision("bf16", "bf16")
LIBRARIES = {"onnxruntime": "onnxruntime-cpu"} | ({} if missing_here("openvino") else {"openvino": "openvino"})
openvino = pytest.mark.skipif("openvino" not in LIBRARIES, reason="openvino is not installed")


def write(path: Path, op: str, domain: str = "") -> None:
    """y = op(x), of one output that is as large as the input."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "g", [x], [y])
    opsets = [
        helper.make_opsetid(name, version) for name, version in {"": 18, **({domain: 1} if domain else {})}.items()
    ]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_every_graph_of_the_part_is_opened(tmp_path: Path) -> None:
    for name in ("model.onnx", "pixels.onnx", "pixels.mha.onnx"):
        write(tmp_path / name, "Neg")
    check_opens("vae_decoder", tmp_path, FP32)
    for name in ("model.onnx", "pixels.onnx", "pixels.mha.onnx"):
        write(tmp_path / name, "Neg", "nowhere")
        with pytest.raises(ExportError, match=rf"^vae_decoder: .*{re.escape(name)}.* onnxruntime-cpu"):
            check_opens("vae_decoder", tmp_path, FP32)
        write(tmp_path / name, "Neg")


@openvino
def test_on_each_engine_that_it_is_for(tmp_path: Path) -> None:
    write(tmp_path / "model.mha.onnx", "SampleOp", "com.microsoft")  # onnxruntime alone has it
    check_opens("unet", tmp_path, FP32)  # attention forms are for onnxruntime only
    write(tmp_path / "model.onnx", "SampleOp", "com.microsoft")
    with pytest.raises(ExportError, match=r"engine openvino can't open"):
        check_opens("unet", tmp_path, FP32)


@pytest.mark.parametrize("opset", [18, 23])
def test_what_an_engine_would_refuse_is_refused(opset: int, tmp_path: Path) -> None:
    """onnxruntime (1.32 at least) moves rounding past transpositions, and from opset 21 on makes nodes that contradict
    themselves: as the graph stands it runs, opened as a user opens it does not."""
    arrays = {"zero": np.int8(0), "scale": np.float32(0.02), "shape": np.array([0, 0, 4, 4], np.int64)}
    arrays |= {"weight": np.ones((16, 16), np.int8), "scales": np.full(16, 0.01, np.float32)}
    steps = [
        ("QuantizeLinear", ["x", "scale", "zero"], {}), ("DequantizeLinear", ["0", "scale", "zero"], {}),
        ("DequantizeLinear", ["weight", "scales"], {"axis": 1}), ("MatMul", ["1", "2"], {}),
        ("Reshape", ["3", "shape"], {}), ("Transpose", ["4"], {"perm": [0, 2, 1, 3]}),
        ("QuantizeLinear", ["5", "scale", "zero"], {}), ("DequantizeLinear", ["6", "scale", "zero"], {}),
        ("Transpose", ["7"], {"perm": [0, 2, 1, 3]}), ("Reshape", ["8", "shape"], {}),
    ]  # fmt: skip
    nodes = [helper.make_node(op, inputs, [str(i)], **more) for i, (op, inputs, more) in enumerate(steps)]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7, 16])]
    ends += [helper.make_tensor_value_info("9", TensorProto.FLOAT, ["batch", 7, 4, 4])]
    values = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
    path = tmp_path / "model.mha.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    try:
        open_engine(path, "onnxruntime-cpu", threads=1).close()
    except EngineError:
        with pytest.raises(ExportError, match=r"model\.mha\.onnx.* onnxruntime-cpu"):
            check_opens("unet", tmp_path, Precision("int8", "int8"))
    else:
        check_opens("unet", tmp_path, Precision("int8", "int8"))


@pytest.mark.parametrize(
    ("file", "precision", "wanted"),
    [
        ("model.onnx", FP32, LIBRARIES),
        ("model.onnx", Precision("int8", "int8"), LIBRARIES),
        ("model.onnx", BF16, {k: v for k, v in LIBRARIES.items() if k != "onnxruntime"}),  # it has no bf16 convolution
        ("pixels.mha.onnx", FP32, {"onnxruntime": "onnxruntime-cpu"}),
    ],
)
def test_which_engines_those_are(file: str, precision: Precision, wanted: dict[str, str]) -> None:
    assert engines_for(file, precision) == wanted


def test_a_graph_that_is_refused_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def check_graph(graph: Path, engine: str) -> None:
        opened.append((graph.parent.name, graph.name, engine))
        if graph.name == "pixels.onnx":
            raise EngineError(f"engine {engine} can't open {graph}: no such node")

    monkeypatch.setattr(openings, "check_graph", check_graph)
    with pytest.raises(ExportError, match=r"vae_decoder: pixels\.onnx .*onnxruntime-cpu.*no such node"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    plain = [("text_encoder", "model.onnx"), ("vae_encoder", "model.onnx"), ("vae_decoder", "model.onnx")]
    wanted = [(*graph, engine) for graph in plain for engine in LIBRARIES.values()]
    assert [each for each in opened if ".mha." not in each[1]] == [
        *wanted,
        ("vae_decoder", "pixels.onnx", "onnxruntime-cpu"),
    ]
    fused = [("vae_encoder", "model.mha.onnx"), ("vae_decoder", "model.mha.onnx"), ("vae_decoder", "pixels.mha.onnx")]
    assert [each for each in opened if ".mha." in each[1]] == [(*graph, "onnxruntime-cpu") for graph in fused]
