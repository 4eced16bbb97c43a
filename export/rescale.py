"""An autoencoder that stays within fp16's range: its inner values scaled down, exactly, by scaling weights.

Every layer of AutoencoderKL that reads the running sum of its residual blocks normalizes it first (GroupNorm), so the
sum may be multiplied by any s: the layers that write to it are scaled by s, the epsilons of those that read it by s
squared, and the results are the same. s is a power of two, and no larger a step than needed, so weights keep their digits. SDXL's autoencoder, whose inner
values pass 65504 (its configuration says force_upcast), computes in fp16 so without new weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

LARGEST = 65504.0  # of fp16
# Values this many times larger than the largest seen still fit; less is asked of a model that is left as it is.
HEADROOM, HEADROOM_UNSCALED = 16.0, 8.0


def scale_for(largest: float, forced: bool) -> float:
    """The power of two to scale inner values by, when the largest seen is `largest`; 1 where none is needed."""
    if not forced and largest * HEADROOM_UNSCALED <= LARGEST:
        return 1.0
    return min(1.0, 2.0 ** math.floor(math.log2(LARGEST / (HEADROOM * largest))))


def largest_inner(module: nn.Module, run: Callable[[], Any]) -> float:
    """The largest absolute value that any layer inside `module` gives while `run()` runs it."""
    seen = [0.0]

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            value = float(output.abs().max())
            seen[0] = max(seen[0], value if math.isfinite(value) else math.inf)

    hooks = [inner.register_forward_hook(watch) for inner in module.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


def rescale(half: nn.Module, s: float) -> None:
    """Scale the inner values of a diffusers `Encoder` or `Decoder` by s, in place; what it gives stays the same."""
    _scale((half.conv_in,), s)
    blocks = [half.mid_block, *(getattr(half, "up_blocks", None) or half.down_blocks)]
    for block in blocks:
        for resnet in block.resnets:
            _scale((resnet.conv1, resnet.conv2), s)
            _scale_epsilon((resnet.norm1, resnet.norm2), s)
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.bias.data = resnet.conv_shortcut.bias.data.float() * s
        for attention in filter(None, getattr(block, "attentions", None) or ()):
            _scale((attention.to_out[0],), s)
            _scale_epsilon((attention.group_norm,), s)
        for sampler in (getattr(block, "upsamplers", None) or getattr(block, "downsamplers", None)) or ():
            sampler.conv.bias.data = sampler.conv.bias.data.float() * s
    _scale_epsilon((half.conv_norm_out,), s)


def _scale(layers: Iterable[Any], s: float) -> None:
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float() * s


def _scale_epsilon(norms: Iterable[Any], s: float) -> None:
    for norm in norms:
        norm.eps *= s * s
