"""A bundle with both decoders: `--vae tiny` draws through the small one, as diffusers does with an AutoencoderTiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")

from diffusers import AutoencoderTiny, StableDiffusionPipeline  # noqa: E402

from vega_edge.bundle import Bundle  # noqa: E402
from vega_edge.cli import main  # noqa: E402
from vega_edge.runtime.pipeline import Pipeline  # noqa: E402
from vega_edge.verify import verify  # noqa: E402

PROMPT, SEED, STEPS, GUIDANCE = "a red cat", 7, 3, 3.0


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, exported: Callable[..., Path]) -> Path:
    return exported(checkpoint, "--tiny-vae", checkpoint / "tiny")


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> dict[str, NDArray[np.uint8]]:
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for vae in ("full", "tiny"):
        if vae == "tiny":
            pipe.vae = AutoencoderTiny.from_pretrained(checkpoint / "tiny", dtype=torch.float32)
        image = pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=64, height=64,
            generator=torch.Generator().manual_seed(SEED),
        ).images[0]  # fmt: skip
        found[vae] = np.asarray(image)
    return found


def test_generate_draws_through_the_decoder_it_is_told(
    bundle: Path, wanted: dict[str, NDArray[np.uint8]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"vae_decoder", "tiny_vae_decoder"} <= {*Bundle.open(bundle).parts}
    assert np.abs(wanted["full"].astype(int) - wanted["tiny"]).mean() > 5  # else nothing would be shown below
    request = ["--steps", str(STEPS), "--guidance", str(GUIDANCE), "--size", "64x64", "--seed", str(SEED)]
    for vae, picture in wanted.items():
        file = tmp_path / f"{vae}.png"
        options = ["--model", str(bundle), "--engine", "onnxruntime-cpu", "--vae", vae, "-o", str(file), "--json"]
        assert main(["generate", PROMPT, *request, *options]) == 0
        assert json.loads(capsys.readouterr().out)
        difference = np.abs(np.asarray(Image.open(file)).astype(int) - picture)
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02, vae


def test_previews_are_the_tiny_ones_whatever_draws(bundle: Path, wanted: dict[str, NDArray[np.uint8]]) -> None:
    pipe = Pipeline.open(bundle, "onnxruntime-cpu", vae="full")
    options: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "width": 64, "height": 64, "seed": SEED}
    *_, last = pipe.stream(PROMPT, **options)
    preview = np.asarray(last.preview()[0]).astype(int)
    pipe.close()
    assert np.abs(preview - wanted["tiny"]).mean() < np.abs(preview - wanted["full"]).mean() / 2


def test_verify_runs_both(bundle: Path) -> None:
    verdict = verify(bundle, "onnxruntime-cpu")
    both = {f"{part}/{file}.onnx" for part in ("vae_decoder", "tiny_vae_decoder") for file in ("model", "pixels")}
    assert verdict.ok and both <= {check.graph for check in verdict.checks}
