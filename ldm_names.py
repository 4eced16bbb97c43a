"""The U-Net's module names in the original (LDM, CompVis and Stability) layout, for diffusers' names.

Single-file checkpoints and many Kohya LoRAs number the blocks from the input to the output, where diffusers has levels:
`input_blocks.4.1` is `down_blocks.1.attentions.0`. The numbers follow from the network's shape alone, so a set of
diffusers' names is all that is asked for. Source of the layout: openaimodel.py of CompVis/stable-diffusion. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(
    r"(?P<way>down|mid|up)_blocks?(?:\.(?P<level>\d+))?\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def ldm_names(modules: Iterable[str]) -> dict[str, str]:
    """diffusers' module name -> LDM's, for every module of a U-Net; names of other kinds are left out.

    `modules` must hold at least one module of each resnet, attention and upsampler that the network has.
    """
    modules = list(modules)
    blocks = [match for match in map(_IN_BLOCK.fullmatch, modules) if match]
    layers = 1 + max((int(m["index"]) for m in blocks if m["way"] == "down" and m["kind"] == "resnets"), default=-1)
    with_attention = {(m["way"], m["level"]) for m in blocks if m["kind"] == "attentions"}
    names = {module: _OUTSIDE[module] for module in modules if module in _OUTSIDE}
    for match in blocks:
        place = _place(match, layers, (match["way"], match["level"]) in with_attention)
        rest = _IN_RESNET.get(match["rest"]) if match["kind"] == "resnets" else match["rest"]
        if match["kind"] in ("downsamplers", "upsamplers"):
            rest = "op" if match["kind"] == "downsamplers" else "conv"
        if rest is not None:
            names[match.string] = f"{place}.{rest}"
    return names


def _place(match: re.Match[str], layers: int, with_attention: bool) -> str:
    """The numbered place of a resnet, attention or sampler; a level has `layers` of them on the way down, one more up."""
    kind, index = match["kind"], int(match["index"])
    if match["way"] == "mid":  # resnet, attention, resnet
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}"
    level = int(match["level"])
    if match["way"] == "down":  # each level: its layers, then the downsampler as a block of its own
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        return f"input_blocks.{block}.{1 if kind == 'attentions' else 0}"
    block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if with_attention else 1}[kind]
    return f"output_blocks.{block}.{inner}"
