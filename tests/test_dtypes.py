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


def cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


WORKING = [status.name for status in available() if status.ok]


@pytest.mark.parametrize("engine", WORKING)
@pytest.mark.parametrize(("dtype", "weights"), list(PRECISIONS))
def test_the_table_is_what_the_engines_do(engine: str, dtype: str, weights: str, tmp_path: Path) -> None:
    """A convolution of each precision, with the nodes that the exporter writes."""
    pytest.importorskip("torch")
    from .precision_graphs import convolution

    said = TABLE[engine][dtype, weights]
    if said == UNTRIED:
        pytest.skip("not tried")
    if dtype == "int8" and engine.startswith("openvino") and "vnni" not in cpu_flags():
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
