"""The bundle that comes with the package holds the checkpoint's own numbers: what is measured of one is true of the other.

Every other comparison exports anew; this one looks into the files that users get.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="reads the checkpoint with diffusers, which needs torch (the export extra)")

import onnx
from diffusers import AutoencoderTiny
from torch import nn

from vega_edge.bench.parity import reference_pipeline
from vega_edge.bundle import Bundle
from vega_edge.export.checkpoint import published_name
from vega_edge.models import recipes

RECIPE = recipes()["demo-vegart"]
HALF_ULP = (
    2.0**-11
)  # relative; what rounding to fp16 costs a fused weight. Those that no LoRA touches are fp16 already.
# The graphs of each part of the checkpoint, and where its parameters' names must begin to be in them.
GRAPHS = [
    ("text_encoder", "text_encoder/model.onnx", ""),
    ("text_encoder_2", "text_encoder_2/model.onnx", ""),
    ("unet", "unet/model.onnx", ""),
    ("vae", "vae_encoder/model.onnx", ("encoder.", "quant_conv.")),
    ("vae", "vae_decoder/model.onnx", ("decoder.", "post_quant_conv.")),
    ("vae", "vae_decoder/pixels.onnx", ("decoder.", "post_quant_conv.")),
    ("tiny_vae", "tiny_vae_decoder/model.onnx", "decoder."),
    ("tiny_vae", "tiny_vae_decoder/pixels.onnx", "decoder."),
]


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    """Not an export of the user's own, which would go before it."""
    assert RECIPE.bundle and RECIPE.checkpoint_path
    return Bundle.open(Path(RECIPE.checkpoint_path).parents[2] / RECIPE.bundle)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    """As diffusers loads them from the checkpoints, the LoRA fused by diffusers, in float32."""
    pipe = reference_pipeline("demo-vegart")
    tiny = AutoencoderTiny.from_pretrained(Path(str(RECIPE.checkpoint_path)).parent / "demo-tiny-vae")
    return {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "unet", "vae")} | {
        "tiny_vae": tiny
    }


@pytest.mark.parametrize(("part", "graph", "names"), GRAPHS, ids=lambda v: v if "/" in v else "")
def test_its_graphs_hold_the_checkpoints_weights(
    shipped: Bundle, networks: dict[str, Any], part: str, graph: str, names: str | tuple[str, ...]
) -> None:
    assert shipped.manifest
    mapped = shipped.manifest.parts[
        graph.split("/")[0]
    ].parameters  # where a LoRA finds weights; autoencoders have none
    linear = {
        published_name(part, f"{n}.weight") for n, m in networks[part].named_modules() if isinstance(m, nn.Linear)
    }
    turned = linear if mapped is None else {name for name, place in mapped.items() if place.transposed}
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(shipped.file(graph)).graph.initializer}
    wanted = {published_name(part, n): p.detach().numpy() for n, p in networks[part].named_parameters()}
    wanted = {name: value for name, value in wanted.items() if name.startswith(names)}
    assert len(wanted) > 30 and wanted.keys() <= stored.keys()
    for name, value in wanted.items():
        got = stored[name].T if name in turned else stored[name]
        assert got.size <= 64 or got.dtype == np.float16, name
        np.testing.assert_allclose(got, value, rtol=1.01 * HALF_ULP, atol=1e-7, err_msg=name)


def test_every_graph_is_compared(shipped: Bundle) -> None:
    graphs = {path.relative_to(shipped.path).as_posix() for path in shipped.path.rglob("*.onnx")}
    assert graphs == {graph for _, graph, _ in GRAPHS}


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_its_words_are_the_checkpoints(shipped: Bundle, part: str) -> None:
    assert RECIPE.checkpoint_path
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        ours, theirs = (folder / part / file for folder in (shipped.path, RECIPE.checkpoint_path))
        if file.endswith(".json"):
            assert json.loads(ours.read_text(encoding="utf-8")) == json.loads(theirs.read_text(encoding="utf-8")), file
        else:
            assert ours.read_text(encoding="utf-8").split() == theirs.read_text(encoding="utf-8").split(), file


def test_it_is_told_what_the_recipe_says(shipped: Bundle) -> None:
    """Defaults and limits are read from the manifest once a bundle is open, from the recipe before."""
    assert shipped.manifest
    assert (shipped.manifest.defaults, shipped.manifest.limits) == (RECIPE.defaults, RECIPE.limits)
    assert shipped.scheduler_config == json.loads(
        (Path(str(RECIPE.checkpoint_path)) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
