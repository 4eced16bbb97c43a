"""A LoRA over all 233 modules that VegaRT's touches, added at opening, against the same one fused by the exporter.

The embedded network has Vega's layers one for one, only narrower, so its modules have Vega's names; the bundle in the
package is the one with the LoRA fused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import vega_edge  # noqa: E402
from vega_edge.bench.lora import TARGETS  # noqa: E402
from vega_edge.bundle import Bundle  # noqa: E402
from vega_edge.lora import read_lora  # noqa: E402
from vega_edge.models import recipes  # noqa: E402
from vega_edge.runtime.patches import Patches  # noqa: E402
from vega_edge.runtime.pipeline import Pipeline  # noqa: E402

OPTIONS: dict[str, Any] = {"steps": 2, "seed": 7, "scheduler": "LCM", "guidance": 0.0}
PROMPT = "a big red star"
STRENGTH = 1.0  # as the packaged bundle was exported


@pytest.fixture(scope="module")
def made(exported: Callable[..., Path]) -> dict[str, Path]:
    """plain: a bundle, half weights and full arithmetic; lora: a file; fused: a bundle that the LoRA was fused into."""
    vegart = recipes()["demo-vegart"]
    ((lora, _),) = vegart.lora_paths
    packaged = Path(vega_edge.__file__).parent / str(vegart.bundle)
    return {"plain": exported("demo-vega", "--weights", "fp16"), "lora": lora, "fused": packaged}


def test_all_of_vegarts_modules_are_touched(made: dict[str, Path]) -> None:
    layers = read_lora(made["lora"]).layers
    assert len(layers) == 233
    kinds = {t for t in TARGETS if any(layer.label.endswith(t.replace(".", "_")) for layer in layers.values())}
    assert kinds == set(TARGETS) and len(kinds) == 14
    assert len(Patches(Bundle.open(made["plain"]), [(made["lora"], STRENGTH)]).of("unet")) == 233


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_it_is_what_fusing_gives(
    made: dict[str, Path], memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))

    def latents(bundle: str, **options: Any) -> np.ndarray:
        pipe = Pipeline.open(made[bundle], "onnxruntime-cpu", **options)
        try:
            return pipe(PROMPT, **OPTIONS).latents
        finally:
            pipe.close()

    original, fused = latents("plain"), latents("fused")
    patched = latents("plain", loras=[(made["lora"], STRENGTH)], memory=memory)
    assert np.abs(patched - fused).max() <= 1e-3 * np.abs(fused).max()
    assert np.abs(patched - original).max() > 0.05 * np.abs(original).max()
    assert np.array_equal(latents("plain"), original)
    halves = latents("plain", loras=[(made["lora"], STRENGTH / 2)] * 2)
    assert np.abs(halves - fused).max() <= 1e-2 * np.abs(fused).max()


def test_the_patched_weights_are_the_fused_ones(made: dict[str, Path]) -> None:
    """Both add in float32 and round once. BLAS adds in another order on another processor or number of cores, and then a
    few numbers are a step of half precision away."""
    from vega_edge.onnx_file import from_stored, read_weights

    fused = read_weights(made["fused"] / "unet" / "model.onnx")
    patched = Patches(Bundle.open(made["plain"]), [(made["lora"], STRENGTH)]).of("unet")
    different = total = 0
    for name, value in patched.items():
        got, wanted = from_stored(value).astype(np.float32), fused[name].read().astype(np.float32)
        step = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float32)
        assert (np.abs(got - wanted) <= step).all(), name
        different, total = different + int((got != wanted).sum()), total + got.size
    assert different < 1e-3 * total


def test_generate_with_a_lora(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vega_edge import cli

    shutil.copyfile(made["lora"], tmp_path / "style.safetensors")
    command = ["generate", PROMPT, "--model", str(made["plain"]), "--engine", "onnxruntime-cpu", "--steps", "1"]
    command += ["--size", "64x64", "--seed", "1", "-o", str(tmp_path / "a.png")]
    assert cli.main([*command, "--lora", f"{tmp_path / 'style.safetensors'}:0.5", "--memory", "low", "--json"]) == 0
    assert f'"file": "{tmp_path / "style.safetensors"}"'.replace("\\", "\\\\") in capsys.readouterr().out
    assert "Model: demo-vega + style:0.5," in Image.open(tmp_path / "a.png").info["parameters"]
    assert cli.main([*command, "--overwrite", "--lora", str(tmp_path / "none.safetensors")]) == 1
    assert capsys.readouterr().err.startswith(f"vega-edge: LoRA {tmp_path / 'none.safetensors'} is not a file")
