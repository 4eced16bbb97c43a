"""Real inputs for comparing an exported part with torch: prompts, a picture of edges and gradients, noised latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

PROMPTS = (  # one batch each; the first is a batch of one, the second of two, of which one is the empty prompt
    ("a portrait of an old fisherman in a yellow raincoat, 85mm photograph",),
    ("a small red house beside a lake, golden hour, masterpiece", ""),
)
_LARGEST_LATENT = 16  # enough for every level of the U-Net, and seconds instead of minutes for a full-size model


class Size(NamedTuple):
    batch: int
    height: int
    width: int


def latent_sizes(unet: Mapping[str, Any]) -> tuple[Size, Size]:
    """Two sizes in latent pixels, with one and two samples; neither is the size the graph is traced with."""
    unit = size_unit(unet)
    side = max(2 * unit, min(_LARGEST_LATENT, unet.get("sample_size") or _LARGEST_LATENT) // unit * unit)
    return Size(1, side, side), Size(2, side + unit, side)


def traced_size(unet: Mapping[str, Any]) -> Size:
    unit = size_unit(unet)
    return Size(3, 4 * unit, 6 * unit)  # 0 and 1 would be taken for constants


def size_unit(unet: Mapping[str, Any]) -> int:
    """Latent heights and widths are multiples of this: the U-Net halves them between its levels."""
    return int(2 ** (len(unet["block_out_channels"]) - 1))


def timesteps(scheduler: Mapping[str, Any]) -> tuple[float, float]:
    """The noisiest that the model was trained on, and one between two timesteps, as Karras schedules have."""
    last = int(scheduler.get("num_train_timesteps", 1000)) - 1
    return float(last), last * 261 // 999 + 0.25


def picture(size: Size, scale: int) -> torch.Tensor:
    """A disc before a graded sky, striped: float32[batch, 3, height * scale, width * scale] in [-1, 1]."""
    height, width = size.height * scale, size.width * scale
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    disc = (x - 0.4) ** 2 + (y - 0.45) ** 2 < 0.06
    planes = [np.where(disc, 0.9, y), np.where(disc, 0.25 + x / 4, 0.6), np.where(disc, 0.1, 1 - y)]
    stripes = 0.05 * np.sign(np.sin(40 * (x + y)))
    one = np.clip(np.stack(planes) + stripes, 0, 1) * 2 - 1
    return torch.from_numpy(np.stack([one, one[:, :, ::-1]][: size.batch]).astype(np.float32))


def noised(latents: torch.Tensor, timestep: float, scheduler: Mapping[str, Any]) -> torch.Tensor:
    """Latents as the U-Net meets them at this timestep: sqrt(a) * x0 + sqrt(1 - a) * noise (Ho et al. 2020, eq. 4)."""
    from diffusers import DDPMScheduler

    alpha = DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod[int(timestep)]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(timestep)))
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def scaling_of(config: Mapping[str, Any], sdxl: bool) -> dict[str, Any]:
    """Return what diffusers' pipelines use of an autoencoder's configuration (diffusers 0.42.1): the SDXL kind's a mean
    and a deviation a channel too, the SD kind's the scaling factor only. None of them uses `shift_factor`."""
    keys = ("scaling_factor", "latents_mean", "latents_std") if sdxl else ("scaling_factor",)
    return {key: config.get(key) for key in keys}


def from_moments(moments: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The encoder's means as latents in the U-Net's scale: the way back from `unscaled`."""
    mean = moments.chunk(2, 1)[0]
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        std, middle = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_std", "latents_mean"))
        return (mean - middle) * config["scaling_factor"] / std
    return mean * config["scaling_factor"]


def unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """From the U-Net's scale to the decoder's, in the words of diffusers' pipelines; `config` as `scaling_of` gives it."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        std, mean = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_std", "latents_mean"))
        return latents * std / config["scaling_factor"] + mean
    return latents / config["scaling_factor"]


def pixels(sample: torch.Tensor) -> NDArray[np.uint8]:
    """[batch, 3, h, w] in [-1, 1] -> uint8[batch, h, w, 3], by diffusers itself."""
    from diffusers.image_processor import VaeImageProcessor

    return np.stack([np.asarray(image) for image in VaeImageProcessor().postprocess(sample, output_type="pil")])


def size_conditioning(size: Size, scale: int) -> torch.Tensor:
    """SDXL's time_ids: original height and width, crop's top and left, target height and width, in pixels."""
    height, width = size.height * scale, size.width * scale
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(size.batch, 1)


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
