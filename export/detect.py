"""Which architecture a single-file checkpoint has, from the names and shapes of its U-Net's weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..models.architectures import Architecture

_UNET = "model.diffusion_model."
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:1\.transformer_blocks\.(\d+)\.)?")
# What else comes as one file; the first that any name contains.
_OTHERS = (
    ("double_blocks.", "a Flux or Hunyuan model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("control_model.", "a ControlNet"),
    (".lora_", "a LoRA; give it with --lora, beside its base model"),
    ("lora_unet_", "a LoRA; give it with --lora, beside its base model"),
    ("down_blocks.", "one part in diffusers' names; give the whole diffusers folder"),
    ("text_model.", "a text encoder alone"),
    ("decoder.", "an autoencoder alone"),
)
_BY_TEXT = {1024: "Stable Diffusion 2", 1280: "SDXL's refiner"}  # channels of the text its cross-attention reads


class Shape(NamedTuple):
    """channels: of the text. down, up: how many transformer layers each numbered block has. middle: its modules, and the
    transformer layers there."""

    channels: int
    down: tuple[int, ...]
    middle: tuple[int, int]
    up: tuple[int, ...]


def detect(path: Path, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Architecture]) -> Architecture:
    """CheckpointError that says what the file is, where that can be told."""
    unet = {name.removeprefix(_UNET): shape for name, shape in shapes.items() if name.startswith(_UNET)}
    first = unet.get("input_blocks.0.0.weight", (0, 4))
    names = ", ".join(known)
    if "input_blocks.0.0.weight" not in unet:
        is_a = next((what for mark, what in _OTHERS if any(mark in name for name in shapes)), "of an unknown kind")
        raise CheckpointError(f"{path} is no checkpoint of a known architecture but {is_a}; known are: {names}")
    if first[1] != 4:
        raise CheckpointError(
            f"{path} takes {first[1]} channels (inpainting or editing); text-to-image models with 4 are exported"
        )
    shape = shape_of(unet)
    for architecture in known.values():
        if shape_of_config(architecture.config("unet")) == shape:
            return architecture
    like = _BY_TEXT.get(shape.channels, f"unknown, its text has {shape.channels} channels and its blocks {shape.down}")
    raise CheckpointError(f"{path}: its architecture is {like}; known are: {names}")


def shape_of(unet: Mapping[str, tuple[int, ...]]) -> Shape:
    """Of the names (without prefix) and shapes of a U-Net in the original layout."""
    depths: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for name in unet:
        if match := _BLOCK.match(name):
            way, block = depths[match[1]], int(match[2])
            way[block] = max(way[block], int(match[3]) + 1 if match[3] else 0)
    texts = [shape[1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    middle = [n for n in unet if n.startswith("middle_block.")]
    layers = {n.split(".transformer_blocks.")[1].split(".")[0] for n in middle if ".transformer_blocks." in n}
    return Shape(
        texts[0] if texts else 0,
        tuple(depths["input_blocks"][i] for i in sorted(depths["input_blocks"])),
        (len(depths["middle_block"]), len(layers)),
        tuple(depths["output_blocks"][i] for i in sorted(depths["output_blocks"])),
    )


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Of a diffusers configuration, by the rules of its UNet2DConditionModel."""
    layers, down_types, up_types = config["layers_per_block"], config["down_block_types"], config["up_block_types"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(down_types) if isinstance(depths, int) else depths
    reverse = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    down = [0]
    for i, kind in enumerate(down_types):
        down += _level(depths[i] if "CrossAttn" in kind else 0, layers)
        down += [0] if i < len(down_types) - 1 else []  # the downsampler
    up = []
    for i, kind in enumerate(up_types):
        up += _level(reverse[i] if "CrossAttn" in kind else 0, layers + 1)
    kind = config.get("mid_block_type")
    deepest = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
    middle = (3, deepest) if kind == "UNetMidBlock2DCrossAttn" else (0, 0) if kind is None else (1, 0)
    return Shape(config["cross_attention_dim"], tuple(down), middle, tuple(up))


def _level(depth: int | Sequence[int], layers: int) -> list[int]:
    return [depth] * layers if isinstance(depth, int) else list(depth)
