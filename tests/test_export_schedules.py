"""Models of other schedules and of unusual networks: exported and drawn as diffusers draws them, or refused by name."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402

from vega_edge import Pipeline  # noqa: E402
from vega_edge.errors import CheckpointError, ExportError, VegaEdgeError  # noqa: E402
from vega_edge.export import export_bundle, hub, model_source, quantize  # noqa: E402
from vega_edge.export.checkpoint import open_configs  # noqa: E402
from vega_edge.models import Origin  # noqa: E402

from .checkpoints import edit  # noqa: E402

SCHEDULER = "scheduler/scheduler_config.json"
BETAS = (np.linspace(0.00085**0.5, 0.012**0.5, 100) ** 2 * 3).tolist()
TRAININGS = {
    "500 timesteps, velocity, zero SNR": {
        "num_train_timesteps": 500, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "100 betas of its own": {"num_train_timesteps": 100, "trained_betas": BETAS},
}  # fmt: skip
# What changes a U-Net's mathematics and is in its graph.
NETWORK = {
    "timestep_post_act": "silu", "time_embedding_act_fn": "gelu", "flip_sin_to_cos": False, "freq_shift": 1,
    "resnet_time_scale_shift": "scale_shift", "center_input_sample": True, "conv_in_kernel": 5, "conv_out_kernel": 5,
}  # fmt: skip


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("training", TRAININGS)
def test_drawn_as_diffusers_draws_it(copy: Path, tmp_path: Path, training: str) -> None:
    """The export's comparison took timestep 999 of any model."""
    edit(copy / SCHEDULER, **TRAININGS[training])
    if "betas" in training:
        torch.manual_seed(1)
        config = {**json.loads((copy / "unet" / "config.json").read_text()), **NETWORK}
        UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    export_bundle(copy, tmp_path / "bundle")
    theirs = StableDiffusionPipeline.from_pretrained(
        copy, safety_checker=None, feature_extractor=None, dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red star", num_inference_steps=5, guidance_scale=3.0, width=64, height=64, output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images.numpy()  # fmt: skip
    with Pipeline.open(tmp_path / "bundle", "onnxruntime-cpu") as pipe:
        got = pipe("a red star", steps=5, guidance=3.0, width=64, height=64, seed=7).latents
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_integer_ranges_of_a_short_schedule() -> None:
    seen = []

    def predict(feeds: dict[str, Any]) -> Any:
        seen.append(float(feeds["timestep"]))
        return feeds["sample"]

    quantize.denoise(predict, {"num_train_timesteps": 4}, [(torch.zeros(1, 4, 8, 8), {})])
    assert len(seen) == 4 and max(seen) == 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a cosine schedule": ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "EDM": ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    "DEIS": ({"_class_name": "DEISMultistepScheduler"}, "DEISMultistepScheduler"),
    "flow prediction": ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    "flow sigmas": ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    "thresholding": ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True"),
    "learned variance": ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type 'learned'"),
    "its own ends": ({"sigma_min": 0.1}, "sigma_min 0.1"),
    "a spacing of no name": ({"timestep_spacing": "even"}, "timestep_spacing 'even'"),
    "betas of another number": ({"trained_betas": BETAS}, "trained_betas"),
    "no betas": ({"trained_betas": []}, "trained_betas"),
    "a billion timesteps": ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
    "PNDM's first steps": ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps False"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_schedulers_that_drawing_refuses(copy: Path, tmp_path: Path, what: str) -> None:
    change, named = REFUSED[what]
    edit(copy / SCHEDULER, **change)
    with pytest.raises(ExportError) as caught:
        export_bundle(copy, tmp_path / "bundle")
    assert named in str(caught.value) and str(copy / SCHEDULER) in str(caught.value)
    assert "\n" not in str(caught.value) and "--scheduler" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_clipping_is_the_sdxl_kinds_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' pipelines of the SD kind turn it off, whatever the file says."""
    copies = {kind: Path(shutil.copytree(path, tmp_path / kind)) for kind, path in checkpoints.items()}
    for folder in copies.values():
        edit(folder / SCHEDULER, _class_name="DDIMScheduler", clip_sample=True)
    assert open_configs(copies["sd"]).scheduler["_class_name"] == "DDIMScheduler"
    with pytest.raises(ExportError, match="clip_sample True"):
        open_configs(copies["xl"])
    edit(copies["xl"] / SCHEDULER, clip_sample=False)
    assert open_configs(copies["xl"]).sdxl


def test_a_bundles_own_scheduler_goes_first(copy: Path) -> None:
    """A class that only walks differently; noise levels of another kind stay refused."""
    edit(copy / SCHEDULER, _class_name="DEISMultistepScheduler", algorithm_type="deis")
    assert open_configs(copy, defaults={"scheduler": "UniPC"}).scheduler["algorithm_type"] == "deis"
    for change in ({"_class_name": "EDMEulerScheduler"}, {"beta_schedule": "squaredcos_cap_v2"}):
        edit(copy / SCHEDULER, **change)
        with pytest.raises(ExportError):
            open_configs(copy, defaults={"scheduler": "UniPC"})


def test_refused_before_weights_are_fetched(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy / SCHEDULER, beta_schedule="squaredcos_cap_v2")
    fetched = []

    def get(file: str) -> Path:
        fetched.append(file)
        return copy / file

    files = {p.relative_to(copy).as_posix(): hub._Remote(None, None, None) for p in copy.rglob("*") if p.is_file()}
    monkeypatch.setattr(hub, "_repository", lambda origin: nullcontext(hub._Repository("a/b", "c" * 40, files, get)))
    monkeypatch.setattr(hub, "_check_room", lambda *_: None)
    source = model_source("hf:a/b")
    assert isinstance(source.place, Origin)
    with pytest.raises(VegaEdgeError, match="squaredcos_cap_v2"):
        source.open()
    assert SCHEDULER in fetched and not [file for file in fetched if file.endswith(".safetensors")]
    edit(copy / SCHEDULER, beta_schedule="scaled_linear")
    assert source.open().path == copy and [file for file in fetched if file.endswith(".safetensors")]


UNETS: dict[str, dict[str, Any]] = {
    "num_class_embeds": {"num_class_embeds": 10},
    "class_embed_type": {"class_embed_type": "timestep"},
    "encoder_hid_dim": {"encoder_hid_dim": 32},
    "encoder_hid_dim_type": {"encoder_hid_dim_type": "image_proj"},
    "attention_type": {"attention_type": "gated"},
    "quantization_config": {"quantization_config": {"load_in_8bit": True}},
    "addition_embed_type": {"addition_embed_type": "text_time"},
    "cross_attention_dim": {"cross_attention_dim": 99},
}


@pytest.mark.parametrize("key", UNETS)
def test_networks_that_are_fed_something_else(copy: Path, key: str) -> None:
    edit(copy / "unet" / "config.json", **UNETS[key])
    with pytest.raises(ExportError) as caught:
        open_configs(copy)
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vae", {"latent_channels": 16}),
        ("vae", {"in_channels": 4}),
        ("text_encoder", {"max_position_embeddings": 248}),
    ],
)
def test_parts_of_another_kind(copy: Path, part: str, change: dict[str, Any]) -> None:
    edit(copy / part / "config.json", **change)
    (value,) = change.values()
    with pytest.raises(ExportError, match=str(value)):
        open_configs(copy)


@pytest.mark.parametrize("named", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"])
def test_a_refiner(checkpoints: dict[str, Path], tmp_path: Path, named: str) -> None:
    copy = Path(shutil.copytree(checkpoints["xl"], tmp_path / "refiner"))
    edit(copy / "model_index.json", _class_name=named, text_encoder=[None, None])
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ExportError, match="refiner"):
        open_configs(copy)


def test_a_network_with_an_aesthetic_score(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The refiner's U-Net under another name: five numbers of size conditioning, where the base model has six."""
    copy = Path(shutil.copytree(checkpoints["xl"], tmp_path / "copy"))
    edit(copy / "unet" / "config.json", projection_class_embeddings_input_dim=24 + 5 * 8)
    with pytest.raises(ExportError, match="refiner"):
        open_configs(copy)
    edit(copy / "unet" / "config.json", projection_class_embeddings_input_dim=24 + 7 * 8)
    with pytest.raises(ExportError, match="projection_class_embeddings_input_dim is 80"):
        open_configs(copy)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_eight_bits(copy: Path, dtype: str, suffix: str) -> None:
    """Without their scales they are another model: the libraries would cast them, and the comparison agree."""
    from safetensors.torch import load_file, save_file

    stem = copy / "unet" / "diffusion_pytorch_model"
    tensors = load_file(f"{stem}.safetensors")
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    if suffix == "bin":
        Path(f"{stem}.safetensors").unlink()
        torch.save(tensors, f"{stem}.bin")
    else:
        save_file(tensors, f"{stem}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        model_source(copy, allow_pickle=True).open()
    kinds = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"} if suffix == "safetensors" else {}
    assert name in str(caught.value) and kinds.get(dtype, dtype) in str(caught.value)
