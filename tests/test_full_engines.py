"""Engines of full-size bundles: `VEGA_EDGE_FULL_BUNDLES=FOLDER pytest -m full`. FOLDER holds bundles, of random weights too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("VEGA_EDGE_FULL_BUNDLES", "")
BUNDLES = sorted(path.parent for path in Path(FOLDER).glob("*/model_index.json")) if FOLDER else []


@pytest.mark.full
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_part_is_built_within_6_gb(bundle):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from vega_edge.bench.engines import measure

    rows = measure(bundle, "tensorrt-rtx")
    assert {"unet/model.onnx", "text_encoder/model.onnx"} <= {row["graph"] for row in rows}
    assert {row["graph"]: row["peak_gb"] for row in rows if row["peak_gb"] > 6} == {}
    weights = (bundle / "unet" / "model.onnx_data").stat().st_size
    assert next(row["mb"] for row in rows if row["graph"] == "unet/model.onnx") * 1e6 > 0.9 * weights
