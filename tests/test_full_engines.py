"""Engines of full-size bundles: `make test-full`. Bundles are in the folder that VEGA_EDGE_FULL_BUNDLES names; those that
are not there yet are exported to it, in fp16, with random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytest.importorskip("psutil", reason="exports need psutil (the export extra)")

from vega_edge.bench.engines import measure

from .full import IN_FULL

FOLDER = os.environ.get("VEGA_EDGE_FULL_BUNDLES", "")
MODELS = (
    "tiny-sd",
    "small-sd",
    "segmind-vega",
    "sdxl-lightning",
)  # segmind-vegart: segmind-vega's graphs, other numbers
pytestmark = [
    pytest.mark.full,
    pytest.mark.needs(memory_gb=16, disk_gb=10),
    IN_FULL,
]


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAESD's shape, which is diffusers' default, with random weights."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("tiny-vae")
    AutoencoderTiny().save_pretrained(folder)
    return folder


def exported(name: str, tiny_vae: Path) -> Path:
    bundle = Path(FOLDER).absolute() / name
    bundle.parent.mkdir(parents=True, exist_ok=True)
    if not bundle.is_dir():
        options = ["--random-weights", "7", "--dtype", "fp16", "--tiny-vae", str(tiny_vae), "-o", str(bundle)]
        subprocess.run([sys.executable, "-m", "vega_edge", "export", name, *options], check=True)
    return bundle


def unet_gb(bundle: Path) -> float:
    return (bundle / "unet" / "model.onnx_data").stat().st_size / 1e9


def allowed_gb(bundle: Path) -> float:
    """6 is the goal for Vega's U-Net, four times its weights; SDXL's is larger."""
    return max(6, 4 * unet_gb(bundle))


@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_built_within_its_memory(name: str, tiny_vae: Path) -> None:
    bundle = exported(name, tiny_vae)
    rows = measure(bundle, "tensorrt-rtx")
    parts = {"text_encoder", "unet", "vae_encoder", "vae_decoder", "tiny_vae_decoder"}
    assert parts <= {row["graph"].split("/")[0] for row in rows}
    assert {row["graph"]: row["peak_gb"] for row in rows if row["peak_gb"] > allowed_gb(bundle)} == {}
    assert next(row["mb"] for row in rows if row["graph"] == "unet/model.onnx") > 900 * unet_gb(bundle)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_make_smaller_engines(precision: str, tiny_vae: Path) -> None:
    """Of Vega. Its matrix products have most of its weights, its convolutions the rest."""
    bundle = exported("segmind-vega", tiny_vae)
    (row,) = measure(bundle, "tensorrt-rtx", ["unet"], precision)
    assert row["mb"] < 750 * unet_gb(bundle)
    assert row["peak_gb"] <= allowed_gb(bundle)


def test_with_a_lora_like_vegarts(tiny_vae: Path) -> None:
    """What it adds lies in the memory of the process that asked for the build."""
    bundle = exported("segmind-vega", tiny_vae)
    (row,) = measure(bundle, "tensorrt-rtx", ["unet"], "graph", 128)
    assert row["peak_gb"] <= allowed_gb(bundle)
    assert row["mb"] > 900 * unet_gb(bundle)
