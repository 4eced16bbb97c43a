"""The parts' torch classes, and a part as an empty shell: to put weights into without a copy, or to know their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ExportError
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
NOT_WEIGHTS = ("position_ids", "logit_scale")  # tables and training leftovers that some files carry
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def new_module(part: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, its parameters without storage (torch's meta device), its buffers real.

    Raises ExportError for a configuration that its library refuses.
    """
    require("torch", "accelerate", "diffusers", "transformers")
    try:
        return _new_module(part, config)
    except Exception as failure:  # the libraries have no error of their own for it
        first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
        raise ExportError(
            f"{part}: its config.json describes no {CLASSES[part]} ({type(failure).__name__}: {first}); fetch it again"
        ) from failure


def _new_module(part: str, config: Mapping[str, Any]) -> nn.Module:
    from accelerate import init_empty_weights

    with quiet(), init_empty_weights(include_buffers=False):
        if part.startswith("text_encoder"):
            import transformers

            settings = transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"})
            settings._attn_implementation = "eager"  # one causal mask for all layers, where others build one in each
            return getattr(transformers, CLASSES[part])(settings)
        import diffusers

        return getattr(diffusers, CLASSES[part]).from_config(dict(config))


def published_name(part: str, name: str) -> str:
    """transformers 5 dropped the level 'text_model.' of CLIPTextModel; published checkpoints and LoRA files have it."""
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"
    return name


class Misfit(NamedTuple):
    """A weight's shape in the files and in the configuration's network; None where it is missing."""

    found: tuple[int, ...] | None
    wanted: tuple[int, ...] | None

    def __str__(self) -> str:
        here, there = ("missing" if s is None else "x".join(map(str, s)) for s in self)
        return f"{here} here, {there} there"


def misfits(part: str, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> dict[str, Misfit]:
    """Those of a part's weights, by published name, that are not as its configuration says; sorted."""
    own = new_module(part, config).state_dict()
    wanted = {published_name(part, name): tuple(tensor.shape) for name, tensor in own.items()}
    known = {_present_name(name): shape for name, shape in found.items() if not name.endswith(NOT_WEIGHTS)}
    names = sorted(n for n in wanted.keys() | known.keys() if wanted.get(n) != known.get(n))
    return {name: Misfit(known.get(name), wanted.get(name)) for name in names}


def _present_name(name: str) -> str:
    """Autoencoders of 2022 call their attention's weights otherwise; diffusers renames them when it loads them."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda m: _RENAMED[m[1]], name)
