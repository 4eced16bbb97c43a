"""What diffusers' pipelines change in a model's configurations, against those pipelines themselves.

The networks are torch's own on both sides, behind the engine protocol here: what differs is what is done with them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="compares with diffusers, which needs torch (the export extra)")
import diffusers  # noqa: E402

from vega_edge import Pipeline  # noqa: E402
from vega_edge.engines import Spec  # noqa: E402
from vega_edge.errors import UsageError  # noqa: E402
from vega_edge.export import graphs  # noqa: E402
from vega_edge.export.checkpoint import load_module, open_checkpoint  # noqa: E402
from vega_edge.runtime import parts  # noqa: E402
from vega_edge.runtime.schedulers import all_schedulers, get_scheduler  # noqa: E402

from .checkpoints import edit  # noqa: E402

SCHEDULER = "scheduler/scheduler_config.json"
ALL = [row.name for row in all_schedulers() if row.family == "diffusers"]
CLIPPING = {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True, "set_alpha_to_one": False}
PROMPT = "a red star"


class TorchEngine:
    def __init__(self, wrapper: Any, spec: graphs.GraphSpec) -> None:
        kinds = {"input_ids": np.int64}
        axes = {name: tuple(size if isinstance(size, int) else None for size in a) for name, a in spec.inputs.items()}
        self.inputs = {name: Spec(np.dtype(kinds.get(name, np.float32)), shape) for name, shape in axes.items()}
        self.outputs = {name: Spec(np.dtype(np.float32), (None,) * len(a)) for name, a in spec.outputs.items()}
        self._wrapper = wrapper

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            out = self._wrapper(**{name: torch.from_numpy(np.array(value)) for name, value in feeds.items()})
        return dict(zip(self.outputs, (t.numpy() for t in (out if isinstance(out, tuple) else (out,))), strict=True))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", params=["sd", "xl"])
def made(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[str, Path, dict[str, TorchEngine]]:
    """(kind, checkpoint, its networks by the bundle's folders)."""
    opened = open_checkpoint(checkpoints[request.param])
    modules: dict[str, Any] = {part: load_module(opened, part).float() for part in opened.parts}
    engines = {}
    for part in [part for part in modules if part.startswith("text")]:
        wrapper = graphs.TextEncoder(modules[part], projection=part == "text_encoder_2")
        engines[part] = TorchEngine(wrapper, graphs.text_encoder_spec(wrapper))
    vae, unet = modules["vae"], modules["unet"]
    engines["vae_encoder"] = TorchEngine(graphs.Encoder(vae), graphs.encoder_spec(vae))
    engines["vae_decoder"] = TorchEngine(graphs.Decoder(vae), graphs.decoder_spec(vae))
    engines["unet"] = TorchEngine(graphs.Denoiser(unet), graphs.denoiser_spec(unet))
    return request.param, checkpoints[request.param], engines


@pytest.fixture
def opened(
    made: tuple[str, Path, dict[str, TorchEngine]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Pipeline]]:
    """opened(scheduler=..., vae=...): diffusers' pipeline, from a picture, and ours, of the checkpoint with these changes."""
    kind, checkpoint, engines = made
    monkeypatch.setattr(parts, "open_engine", lambda path, *_, **__: engines[path.parent.name])

    def make(scheduler: dict[str, Any], vae: dict[str, Any]) -> tuple[Any, Pipeline]:
        copy, bundle = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint")), tmp_path / "bundle"
        edit(copy / SCHEDULER, **scheduler)
        edit(copy / "vae" / "config.json", **vae)
        for part in (*engines, *(p.name for p in copy.glob("tokenizer*")), "scheduler"):
            (bundle / part).mkdir(parents=True)
            for file in (copy / ("vae" if part.startswith("vae") else part)).iterdir():
                if file.suffix in (".json", ".txt"):
                    shutil.copyfile(file, bundle / part / file.name)
            if part in engines:
                (bundle / part / "model.onnx").touch()
        shutil.copyfile(copy / "model_index.json", bundle / "model_index.json")
        name = "StableDiffusionXLImg2ImgPipeline" if kind == "xl" else "StableDiffusionImg2ImgPipeline"
        extra = {} if kind == "xl" else {"safety_checker": None, "feature_extractor": None}
        theirs = getattr(diffusers, name).from_pretrained(copy, dtype=torch.float32, **extra)
        theirs.set_progress_bar_config(disable=True)
        return theirs, Pipeline.open(bundle, "onnxruntime-cpu")

    return make


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def error(theirs: Any, ours: Pipeline, name: str, image: Image.Image | None, seed: int = 7) -> float:
    """The largest difference of the final latents over their largest value."""
    row, steps = get_scheduler(name), 3 if name in ("LCM", "TCD") else 6
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent", "eta": row.eta or 0.0}
    own, own_options = theirs.scheduler, {"steps": steps, "guidance": 1.0, "seed": seed, "scheduler": name}
    generator = torch.Generator().manual_seed(seed)
    theirs.scheduler = getattr(diffusers, str(row.diffusers)).from_config(own.config, **row.forced)
    if image is None:
        cls = "StableDiffusionXLPipeline" if "text_encoder_2" in theirs.components else "StableDiffusionPipeline"
        pipe = getattr(diffusers, cls)(**theirs.components)
        pipe.set_progress_bar_config(disable=True)
        expected = pipe(PROMPT, width=64, height=64, generator=generator, **options).images.numpy()
        got = ours(PROMPT, width=64, height=64, **own_options).latents
    else:
        expected = theirs(PROMPT, image=image, strength=0.7, generator=generator, **options).images.numpy()
        got = ours(PROMPT, image=image, strength=0.7, width=64, height=64, **own_options).latents
    theirs.scheduler = own
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [None, picture()], ids=["noise", "picture"])
def test_an_offset_of_zero(opened: Callable[..., tuple[Any, Pipeline]], start: Image.Image | None) -> None:
    """The SD kind's pipelines make it one: 13 of 18 schedulers drew pictures that differed by up to 4e-2."""
    theirs, ours = opened({"steps_offset": 0, "skip_prk_steps": True, "clip_sample": False}, {})
    assert {name: e for name in ALL if (e := error(theirs, ours, name, start)) > 5e-4} == {}


@pytest.mark.filterwarnings("ignore")
def test_clipping(made: tuple[str, Any, Any], opened: Callable[..., tuple[Any, Pipeline]]) -> None:
    """The SD kind's pipelines turn it off; the SDXL kind's clip, which is refused."""
    theirs, ours = opened(CLIPPING, {})
    if made[0] == "sd":
        assert max(error(theirs, ours, name, None) for name in ("DDIM", "DDPM", "Euler")) < 5e-4
        return
    for name in ("DDIM", "DDPM"):
        with pytest.raises(UsageError, match="clip_sample True"):
            ours.request(PROMPT, scheduler=name, width=64, height=64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "vae",
    [{"shift_factor": 0.7}, {"latents_mean": [0.5, -1, 0, 2], "latents_std": [0.5, 2, 1, 3]}],
    ids=["shift", "mean"],
)
def test_scaling_of_latents(opened: Callable[..., tuple[Any, Pipeline]], vae: dict[str, Any]) -> None:
    """No pipeline of these kinds uses a shift; a mean and a deviation a channel, only the SDXL kind's."""
    theirs, ours = opened({}, vae)
    assert error(theirs, ours, "Euler", picture()) < 5e-4
    row = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(3)}
    expected = theirs(PROMPT, image=picture(), strength=0.5, **row).images[0]
    got = ours(
        PROMPT, image=picture(), strength=0.5, width=64, height=64, steps=4, guidance=1.0, seed=3,
        scheduler="Euler",
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(expected).astype(int) - np.asarray(got)).max() <= 1


def test_the_configurations_are_those_that_were_changed(opened: Callable[..., tuple[Any, Pipeline]]) -> None:
    theirs, ours = opened({"steps_offset": 0}, {})
    assert json.loads((ours.bundle.path / SCHEDULER).read_text())["steps_offset"] == 0
    assert ours._scheduler_config["steps_offset"] == theirs.scheduler.config.steps_offset
