"""The parts' torch classes, and a part as an empty shell that weights are put into without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .packages import require
from .quiet import quiet

if TYPE_CHECKING:
    from torch import nn

CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
    "unet": "UNet2DConditionModel",
    "tiny_vae": "AutoencoderTiny",
}


def new_module(part: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, its parameters without storage (torch's meta device), its buffers real."""
    require("torch", "accelerate", "diffusers", "transformers")
    from accelerate import init_empty_weights

    with quiet(), init_empty_weights(include_buffers=False):
        if part.startswith("text_encoder"):
            import transformers

            settings = transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"})
            settings._attn_implementation = "eager"  # one causal mask for all layers, where others build one in each
            return getattr(transformers, CLASSES[part])(settings)
        import diffusers

        return getattr(diffusers, CLASSES[part]).from_config(dict(config))
