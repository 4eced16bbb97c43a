"""A tiny autoencoder for the same latents, in TAESD's layout (https://github.com/madebyollin/taesd): convolutions only.

The decoder learns pictures from the big autoencoder's scaled latents, the encoder those latents from pictures.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from .autoencoder import edge_loss
from .checkpoints import save_half
from .common import SCALING_FACTOR, pictures, sample_scenes, to_model_range
from .hogwild import Job, train

WIDTH = 24


def new_tiny_autoencoder() -> AutoencoderTiny:
    """TAESD's configuration, narrower. Its latents are the scaled ones: scaling_factor 1."""
    widths = (WIDTH,) * 4
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)


@torch.no_grad()
def tiny_context(vae: Path, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [n, 3, 128, 128] and their scaled latents float32 [n, 4, 16, 16]."""
    pixels = pictures(sample_scenes(seed, n))
    big = AutoencoderKL.from_pretrained(vae)
    return pixels, torch.cat(
        [big.encode(to_model_range(p)).latent_dist.mean * SCALING_FACTOR for p in pixels.split(32)]
    )


def tiny_loss(
    model: AutoencoderTiny,
    pixels: torch.Tensor,
    latents: torch.Tensor,
    batch: int,
    rng: np.random.Generator,
    progress: float,
) -> torch.Tensor:
    index = torch.from_numpy(rng.integers(len(pixels), size=batch))
    y, x = (int(v) for v in rng.integers(9, size=2))  # crops of 64 px, 8 latents
    z = latents[index, :, y : y + 8, x : x + 8]
    picture = to_model_range(pixels[index, :, 8 * y : 8 * y + 64, 8 * x : 8 * x + 64])
    # The encoder sees a crop without its surroundings; its outermost latents are left out of the comparison.
    encoded = model.encoder(picture)
    return edge_loss(model.decoder(z), picture) + 0.1 * (encoded - z)[..., 1:-1, 1:-1].abs().mean()


def train_tiny_autoencoder(vae: Path, out: Path, steps: int, seed: int = 7, processes: int = 2) -> None:
    job = Job(
        "tiny autoencoder",
        new_tiny_autoencoder,
        tiny_loss,
        partial(tiny_context, vae, seed, 1500),
        steps,
        batch=8,
        peak_lr=2e-3,
        seed=seed,
    )
    save_half(train(job, processes), out)
