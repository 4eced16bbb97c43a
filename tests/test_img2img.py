"""Starting from a picture, against diffusers' own pipelines on the same tiny random networks and seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
from diffusers import (  # noqa: E402
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from vega_edge.export import export_bundle  # noqa: E402
from vega_edge.runtime.pipeline import Pipeline  # noqa: E402
from vega_edge.runtime.schedulers import get_scheduler  # noqa: E402

from .test_export_checkpoint import make_checkpoint  # noqa: E402

PROMPT, NEGATIVE = "a red star", "a moon"


class Encode(torch.nn.Module):
    """What a bundle's vae_encoder is: a picture to the moments of its latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.vae._encode(sample)


@pytest.fixture(scope="module", params=["sd", "xl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, bundle with an encoder)."""
    folder = tmp_path_factory.mktemp("img2img")
    checkpoint = make_checkpoint(folder / "checkpoint", sdxl=request.param == "xl")
    bundle = folder / "bundle"
    export_bundle(checkpoint, bundle)
    if not (bundle / "vae_encoder").is_dir():
        (bundle / "vega-edge.json").unlink()
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae", dtype=torch.float32)
        (bundle / "vae_encoder").mkdir()
        axes = {0: "batch", 2: "height", 3: "width"}
        torch.onnx.export(
            Encode(vae).eval(), (torch.zeros(1, 3, 32, 32),), bundle / "vae_encoder" / "model.onnx", dynamo=False,
            input_names=["sample"], output_names=["latent_parameters"], dynamic_axes={"sample": axes},
        )  # fmt: skip
        shutil.copyfile(checkpoint / "vae" / "config.json", bundle / "vae_encoder" / "config.json")
    return checkpoint, bundle


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("scheduler", "guidance"), [("Euler", 4.0), ("Euler a", 1.0), ("LCM", 1.0), ("PNDM", 3.0)])
def test_the_same_latents_as_diffusers(made: tuple[Path, Path], scheduler: str, guidance: float) -> None:
    import diffusers

    checkpoint, bundle = made
    xl = "XL" in json.loads((checkpoint / "model_index.json").read_text())["_class_name"]
    cls = StableDiffusionXLImg2ImgPipeline if xl else StableDiffusionImg2ImgPipeline
    extra = {} if xl else {"safety_checker": None, "feature_extractor": None}
    theirs = cls.from_pretrained(checkpoint, dtype=torch.float32, **extra)
    pipe = Pipeline.open(bundle, "onnxruntime-cpu")
    row = get_scheduler(scheduler)
    forced = {**row.forced, **({"skip_prk_steps": True} if scheduler == "PNDM" else {})}  # what ours takes silence for
    theirs.scheduler = getattr(diffusers, str(row.diffusers)).from_config(theirs.scheduler.config, **forced)
    theirs.set_progress_bar_config(disable=True)
    seeds = [7, 8]
    expected = theirs(
        [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, image=[picture()] * 2, strength=0.6, num_inference_steps=5,
        guidance_scale=guidance, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="latent",
    ).images.numpy()  # fmt: skip
    ours = pipe(
        PROMPT, negative=NEGATIVE, image=picture(), strength=0.6, steps=5, guidance=guidance, seed=7, samples=2,
        scheduler=scheduler, width=64, height=64,
    )  # fmt: skip
    assert len(ours.images) == 2 and "encode" in ours.timings
    assert np.abs(ours.latents - expected).max() <= 1e-3 * np.abs(expected).max()


def test_how_far_it_goes(made: tuple[Path, Path]) -> None:
    pipe = Pipeline.open(made[1], "onnxruntime-cpu")
    options: dict[str, Any] = {
        "image": picture((64, 128)),
        "steps": 4,
        "seed": 1,
        "guidance": 1.0,
        "scheduler": "Euler",
    }
    steps = list(pipe.stream(PROMPT, strength=0.5, **options))
    assert [(s.index, s.total) for s in steps] == [(1, 2), (2, 2)]
    assert pipe.total(pipe.request(PROMPT, strength=0.5, **options)) == 2
    request = pipe.request(PROMPT, strength=0.5, **options)
    assert (request.width, request.height) == (64, 128)
    assert "Denoising strength: 0.5" in request.parameters("m", "1")
    start = pipe._encoder.encode(picture(), 64, 64)
    near, far = (
        np.abs(pipe(PROMPT, strength=s, **{**options, "image": picture()}).latents[0] - start.mean * 0.5).mean()
        for s in (0.25, 1.0)
    )
    assert near < far
