"""Which configurations can be exported, from their JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ExportError
from .modules import CLASSES

# A part's list of channels, one a level: how far it shrinks a picture
_LEVELS = {
    "unet": "block_out_channels",
    "vae": "block_out_channels",
    "tiny_vae": "decoder_block_out_channels",
}


def check_config(part: str, config: Mapping[str, Any]) -> None:
    """ExportError for a network of another kind than is exported, or without the numbers that the export goes by."""
    named = config.get("architectures") or [None]
    if not isinstance(named, list):
        raise ExportError(f"{part}: architectures is {named!r}, not a list; exported is ['{CLASSES[part]}']")
    kind = config.get("_class_name") or named[0]
    if kind != CLASSES[part]:
        raise ExportError(f"{part} is a {kind}; exported is {CLASSES[part]}")
    if (levels := _LEVELS.get(part)) is not None and not _are_counts(config.get(levels)):
        got = config.get(levels)
        raise ExportError(
            f"{part}: {levels} is {got!r}; it must be a list of whole numbers; fetch its config.json again"
        )
    if part != "unet":
        return
    allowed = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "in_channels": (config.get("out_channels", 4),),  # inpainting and editing models have more
    }
    for key, values in allowed.items():
        got = config.get(key, values[0])
        if got not in values:
            raise ExportError(f"unet: {key} is {got!r}; text-to-image models with {_or(values)} are exported")


def check_same_latents(vae: Mapping[str, Any], tiny: Mapping[str, Any]) -> None:
    """ExportError for a tiny autoencoder of other latents."""
    channels = vae.get("latent_channels", 4), tiny.get("latent_channels", 4)
    levels = len(vae["block_out_channels"]), len(tiny["decoder_block_out_channels"])
    if len(set(channels)) > 1 or len(set(levels)) > 1:
        raise ExportError(
            f"tiny_vae decodes {channels[1]} channels over {levels[1]} levels, the checkpoint's latents have "
            f"{channels[0]} over {levels[0]}; use a tiny autoencoder made for these latents"
        )


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(n) is int and n > 0 for n in value)


def _or(values: tuple[Any, ...]) -> str:
    return " or ".join("null" if v is None else repr(v) for v in values)
