"""Which precision runs on which engine: the documentation says what the table says, and the table what the engines do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vega_edge
from vega_edge.engines import ENGINES, available, open_engine
from vega_edge.engines.dtypes import PRECISIONS, TABLE, UNTRIED, YES, check_dtype, render
from vega_edge.errors import EngineError
from vega_edge.manifest import MANIFEST
from vega_edge.models import find_bundle
from vega_edge.runtime.pipeline import Pipeline

from .cpu_units import saturates

WORKING = [status.name for status in available() if status.ok]


def test_the_documentation_has_the_table() -> None:
    text = (Path(vega_edge.__file__).parent / "docs" / "dtypes.md").read_text(encoding="utf-8")
    assert render() in text


def test_every_engine_has_every_precision() -> None:
    assert set(TABLE) == set(ENGINES)
    assert all(set(row) == set(PRECISIONS) for row in TABLE.values())


def test_a_pair_that_does_not_run_is_refused_by_name() -> None:
    check_dtype("onnxruntime-cpu", "fp16", "fp16")
    check_dtype("onnxruntime-cuda", "fp16", "fp16")  # not tried is not refused
    check_dtype("an engine of tomorrow", "bf16", "bf16")
    with pytest.raises(EngineError) as caught:
        check_dtype("onnxruntime-cpu", "bf16", "bf16")
    assert str(caught.value) == (
        "engine onnxruntime-cpu can't run a bundle of dtype bf16: onnxruntime has no bf16 convolution on a CPU; "
        "use openvino or openvino-bf16, or export it with another dtype"
    )


def test_opening_a_bundle_refuses_the_pair_before_any_graph_is_read(tmp_path: Path) -> None:
    """The documentation says so: docs/dtypes.md."""
    folder = tmp_path / "bundle"
    shutil.copytree(find_bundle("demo-vegart"), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "dtype": "bf16", "weights": "bf16"}))
    with pytest.raises(
        EngineError, match=r"^engine onnxruntime-cpu can't run a bundle of dtype bf16: onnxruntime has no"
    ):
        Pipeline.open(folder, "onnxruntime-cpu", verify=False)


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("width", [16, 32, 320])
def test_weights_in_eight_bits_leave_the_arithmetic_in_full_precision(engine: str, width: int, tmp_path: Path) -> None:
    """Both libraries would round the other factor to eight bits too, in groups of 32, which a miniature's layers lack."""
    onnx = pytest.importorskip("onnx")
    if engine not in WORKING:
        pytest.skip(f"{engine} can't be used here")
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (width, 64)).astype(np.int8)
    scale = random.uniform(1e-3, 2e-3, 64).astype(np.float32)
    x = random.normal(size=(1, 77, width)).astype(np.float32)
    values = [onnx.numpy_helper.from_array(array, name) for array, name in ((weight, "weight"), (scale, "scale"))]
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["weight", "scale"], ["wide"], axis=1),
        onnx.helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 77, size])
        for name, size in (("x", width), ("y", 64))
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    opened = open_engine(tmp_path / "model.onnx", engine, threads=1)
    got = opened.run({"x": x})["y"]
    opened.close()
    wanted = x.astype(np.float64) @ (weight * scale.astype(np.float64))
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("engine", WORKING)
@pytest.mark.parametrize(("dtype", "weights"), list(PRECISIONS))
def test_the_table_is_what_the_engines_do(engine: str, dtype: str, weights: str, tmp_path: Path) -> None:
    """A convolution of each precision, with the nodes that the exporter writes."""
    pytest.importorskip("torch")
    from .precision_graphs import convolution

    said = TABLE[engine][dtype, weights]
    if said == UNTRIED:
        pytest.skip("not tried")
    if saturates(engine, dtype):
        pytest.skip("without VNNI, OpenVINO adds pairs of 8-bit products in 16 bits, which saturates")
    path, x, wanted = convolution(dtype, weights, tmp_path)
    if engine == "onnxruntime-cuda":  # what the provider lacks, onnxruntime runs on the CPU: right, and slow
        pytest.skip("that it runs does not say where")
    try:
        opened = open_engine(path, engine, threads=1)
        got = opened.run({"x": x.astype(opened.inputs["x"].dtype)})["y"]
        opened.close()
    except EngineError:
        assert said != YES
        return
    assert said == YES
    limit = 0.1 if "bf16" in (dtype, engine.rpartition("-")[2]) or dtype == "int8" else 5e-3
    assert np.abs(got - wanted).max() < limit * np.abs(wanted).max()
