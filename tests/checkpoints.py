"""The tiny random checkpoints that the tests export: diffusers folders of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("r e", "re d</w>", "c a", "ca t</w>")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path, pad: str) -> int:
    """CLIP's layout: 256 bytes, the same at a word's end, merges, start, end. Returns the size of the vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    merged = (m.replace(" ", "") for m in MERGES)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merged, START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special},
    )
    return len(tokens)


def _text_encoder(kind: type, vocabulary: int, width: int, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=width,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return kind(config)


def _unet(sdxl: bool) -> Any:
    if sdxl:  # as Segmind-Vega: one level without attention, a middle block without attention, size conditioning
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=40,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1],
            attention_head_dim=[1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            use_linear_projection=True,
        )
    return UNet2DConditionModel(  # as Tiny-SD: no middle block, 1x1 convolutions about the attention
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
    )


def make_checkpoint(folder: Path, sdxl: bool) -> Path:
    """A whole diffusers folder in fp16, with a TAESD-like autoencoder in `tiny/`, of random weights."""
    torch.manual_seed(0)
    index = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    modules = {"unet": _unet(sdxl)}
    size = write_tokenizer(folder / "tokenizer", END)
    modules["text_encoder"] = _text_encoder(CLIPTextModel, size, 16, "quick_gelu")
    if sdxl:
        write_tokenizer(folder / "tokenizer_2", "!")
        modules["text_encoder_2"] = _text_encoder(CLIPTextModelWithProjection, size, 24, "gelu")
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    modules["vae"] = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        force_upcast=True,
    )
    modules["tiny"] = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for name, module in modules.items():
        for parameter in module.parameters():  # zero biases and norms of one would hide that they are mixed up
            parameter.data += 0.05 * torch.randn(parameter.shape)
        module.half().save_pretrained(folder / name)
    edit(folder / "tiny" / "config.json", scaling_factor=...)  # as published files before diffusers 0.10
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    kind = "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    write_json(folder / "model_index.json", {"_class_name": kind, "force_zeros_for_empty_prompt": True, **index})
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... removes one."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in values.items() if value is not ...})
