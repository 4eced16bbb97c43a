"""The checkpoints' folders, in diffusers' format: written whole, read by diffusers unchanged."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from .models import BETAS, TextToNoise, write_tokenizer

_SCHEDULER = {
    "_diffusers_version": "0.42.1",
    **BETAS,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    # as published for Segmind-Vega, but for the version
    "vega": {"_class_name": "EulerDiscreteScheduler", **_SCHEDULER, "clip_sample": False, "interpolation_type": "linear", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "use_karras_sigmas": False},
    "sd": {"_class_name": "DPMSolverMultistepScheduler", **_SCHEDULER, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "clip_sample": False, "set_alpha_to_one": False, "use_karras_sigmas": False},
}  # fmt: skip
_PARTS = {
    "vega": ("StableDiffusionXLPipeline", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "sd": ("StableDiffusionPipeline", ("CLIPTextModel",)),
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizers(folder: Path, kind: str) -> list[Path]:
    """CLIP's pads with its end token, OpenCLIP's with '!' (id 0)."""
    folders = [folder / "tokenizer", folder / "tokenizer_2"][: len(_PARTS[kind][1])]
    for path, pad in zip(folders, ("<|endoftext|>", "!"), strict=False):
        write_tokenizer(path, pad)
    return folders


def write_checkpoint(folder: Path, kind: str, model: TextToNoise, vae: Path) -> None:
    """`kind` is 'vega' or 'sd'; weights in fp16 safetensors. The autoencoder's folder is copied."""
    pipeline, encoders = _PARTS[kind]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    if kind == "vega":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", SCHEDULERS[kind]["_class_name"]],
    }
    for i, name in enumerate(encoders):
        suffix = "_2" if i else ""
        index[f"text_encoder{suffix}"] = ["transformers", name]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        save_half(model.encoders[i], folder / f"text_encoder{suffix}")
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    save_half(model.unet, folder / "unet")
    write_tokenizers(folder, kind)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[kind])
    save_half(AutoencoderKL.from_pretrained(vae), folder / "vae")
    write_json(folder / "model_index.json", index)


def without_innermost(small: dict[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """A small U-Net's weights for a tiny one: the same blocks less the middle and the innermost level, as BK-SDM's Tiny
    is made from its Small (arXiv:2305.15798). The upward blocks, counted from the inside, move down by one."""
    moved = {re.sub(r"^up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) - 1}", k): v for k, v in small.items()}
    return {k: moved[k] for k in wanted}


def load_weights(model: TextToNoise, folder: Path) -> TextToNoise:
    """The network's and the encoders' weights from a checkpoint's folder, into float32; a small model's into a tiny one,
    and the encoders' alone where the folder has no more."""
    if (folder / "unet").is_dir():
        weights, wanted = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), model.unet.state_dict()
        if len(weights) > len(wanted):
            weights = without_innermost(weights, wanted)
        model.unet.load_state_dict(weights)
    for encoder, name in zip(model.encoders, ("text_encoder", "text_encoder_2"), strict=False):
        load_encoder(encoder, folder / name)
    return model


def load_encoder(encoder: nn.Module, folder: Path) -> None:
    """A text encoder's weights, but for a projection that it lacks."""
    weights = load_file(folder / "model.safetensors")
    wanted = encoder.state_dict()
    if not any(name.startswith("text_model.") for name in wanted):  # CLIPTextModel has lost that level
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    encoder.load_state_dict({name: weights[name] for name in wanted})


def save_half(module: nn.Module, folder: Path) -> None:
    copied = copy.deepcopy(module).to(torch.float16)
    copied.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "torch_dtype", "dtype"):
        config.pop(key, None)
    write_json(folder / "config.json", config)
