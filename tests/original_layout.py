"""Tiny networks written as single files in the original SD 1.5 / SDXL layout: the way back from diffusers' names.

Written from the layout's own module names (CompVis' ldm/modules, OpenAI's CLIP), not from diffusers' conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vega_edge.ldm_names import ldm_names

Tensors = dict[str, Any]


def original(folder: Path, sdxl: bool) -> Tensors:
    """All weights of a diffusers folder by their names in one original-layout file."""
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    files |= {"text_encoder_2": "model"} if sdxl else {}
    parts = {part: load_file(folder / part / f"{stem}.safetensors") for part, stem in files.items()}
    first = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    tensors = {f"{first}{name}": tensor for name, tensor in parts["text_encoder"].items()}
    tensors |= {f"model.diffusion_model.{name}": tensor for name, tensor in unet(parts["unet"])}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae(parts["vae"])}
    if sdxl:
        tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in open_clip(parts["text_encoder_2"])}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unet(weights: Tensors) -> Iterator[tuple[str, Any]]:
    split = {name: name.rpartition(".") for name in weights}
    names = ldm_names({owner for owner, _, _ in split.values()})
    for name, (owner, _, kind) in split.items():
        yield f"{names[owner]}.{kind}", weights[name]


def vae(weights: Tensors) -> Iterator[tuple[str, Any]]:
    """encoder.down.LEVEL.block.N, encoder.mid.block_1/attn_1/block_2; the decoder counts its levels from the last."""
    levels = 1 + max(int(m[1]) for m in (re.search(r"up_blocks\.(\d+)", n) for n in weights) if m)
    for name, tensor in weights.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        new = new.replace("conv_shortcut", "nin_shortcut")
        if "attn_1" in new:
            for theirs, ours in (
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ):
                new = new.replace(f"attn_1.{theirs}.", f"attn_1.{ours}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # there it is a 1x1 convolution
        yield new, tensor


def open_clip(weights: Tensors) -> Iterator[tuple[str, Any]]:
    """transformer.resblocks.N with one matrix for query, key and value; the projection transposed."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    yield "text_projection", weights.pop("text_projection.weight").T
    yield "positional_embedding", weights.pop("embeddings.position_embedding.weight")
    yield "token_embedding.weight", weights.pop("embeddings.token_embedding.weight")
    yield "logit_scale", torch.tensor(4.6)
    for name, tensor in weights.items():
        new = name.replace("final_layer_norm", "ln_final").replace("encoder.layers.", "transformer.resblocks.")
        for theirs, ours in (
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            new = new.replace(theirs, ours)
        new = new.replace("self_attn.out_proj", "attn.out_proj")
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", new):
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            yield f"{match[1]}attn.in_proj_{match[2]}", torch.cat(parts)
        elif "self_attn" not in new:
            yield new, tensor
