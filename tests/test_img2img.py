"""Starting from a picture, against diffusers' own pipelines on the same tiny random networks and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
from diffusers import (  # noqa: E402
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from vega_edge.runtime.pipeline import Pipeline  # noqa: E402
from vega_edge.runtime.schedulers import get_scheduler  # noqa: E402

PROMPT, NEGATIVE = "a red star", "a moon"


@pytest.fixture(scope="module", params=["sd", "xl"])
def made(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], exported: Callable[..., Path]
) -> tuple[Path, Path]:
    """(checkpoint, bundle with an encoder)."""
    checkpoint = checkpoints[request.param]
    return checkpoint, exported(checkpoint, "--tiny-vae", checkpoint / "tiny")


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
