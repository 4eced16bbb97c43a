"""Where ONNX files keep their weights, against files that the onnx package wrote; and rounding to what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_edge.errors import BundleError
from vega_edge.onnx_file import from_stored, read_weights, to_stored

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

KINDS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def tensor(name: str, values: np.ndarray, dtype: str) -> onnx.TensorProto:
    stored = to_stored(values, dtype)
    return helper.make_tensor(name, KINDS[dtype], values.shape, stored.tobytes(), raw=True)


def write(path: Path, tensors: list[onnx.TensorProto], outside: bool) -> Path:
    graph = helper.make_graph([], "g", [], [], initializer=tensors)
    model = helper.make_model(graph, doc_string="something before the graph", producer_name="x" * 300)
    onnx.save(model, path, save_as_external_data=outside, location="weights.bin", size_threshold=64)
    return path


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("outside", [False, True])
def test_every_weight_is_found(tmp_path: Path, dtype: str, outside: bool) -> None:
    random = np.random.default_rng(0)
    values = {
        f"layer.{i}.wéight": random.standard_normal((3 + i, 40, 3, 3)[: 2 + 2 * (i % 2)], np.float32) for i in range(5)
    }
    path = write(tmp_path / "model.onnx", [tensor(n, v, dtype) for n, v in values.items()], outside)
    found = read_weights(path)
    assert list(found) == list(values)
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape, found[name].external) == (dtype, value.shape, outside)
        assert np.array_equal(found[name].read(), from_stored(to_stored(value, dtype)).reshape(value.shape))


def test_what_is_no_weight_is_left_out_or_said(tmp_path: Path) -> None:
    ids = numpy_helper.from_array(np.arange(40), "ids")
    listed = helper.make_tensor("listed", TensorProto.FLOAT, [2], [1.0, 2.0])  # not in raw_data
    scalar = numpy_helper.from_array(np.float32(3), "scalar")
    found = read_weights(write(tmp_path / "model.onnx", [ids, listed, scalar], False))
    assert list(found) == ["ids", "scalar"]
    assert found["scalar"].read() == 3 and found["scalar"].shape == ()
    with pytest.raises(BundleError) as error:
        found["ids"].read()
    assert str(error.value) == f"{tmp_path / 'model.onnx'}: a weight of ONNX data type 7 can't be read as numbers"


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", [tensor("w", np.ones((64, 64), np.float32), "fp32")], True)
    whole = path.read_bytes()
    for damaged in (whole[:-3], b"\xff" * 40, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0b"):
        path.write_bytes(damaged)
        with pytest.raises(BundleError) as error:
            read_weights(path)
        assert str(error.value) == f"{path} is no ONNX graph, or is damaged; copy or export the bundle again"
    path.write_bytes(whole)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(BundleError) as error:
        read_weights(path)["w"].read()
    assert str(error.value) == f"{tmp_path / 'weights.bin'} is truncated; copy or export the bundle again"


@settings(deadline=None)  # the first call imports torch
@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bfloat16_is_the_nearest_half_to_even(value: float) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.tensor([value], dtype=torch.float32).bfloat16().float().item()
    assert from_stored(to_stored(np.float32([value]), "bf16")).item() == expected


@pytest.mark.parametrize("location", ["../weights", "a/../../weights", "/weights", "C:\\weights", "..\\weights"])
def test_weights_outside_the_graphs_folder_are_not_read(tmp_path: Path, location: str) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    graph = helper.make_graph([], "graph", [], [], [tensor])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(BundleError) as caught:
        read_weights(path)
    assert str(caught.value) == f"{path} keeps weights in {location!r}, which is not in its folder; it is not opened"
