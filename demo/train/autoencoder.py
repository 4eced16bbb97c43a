"""The autoencoder: AutoencoderKL as Stable Diffusion's, narrower.

Trained on crops with an L1 loss on pixels and on their differences (edges are what a flat picture is made of). Its
latents are then whitened per channel, exactly, by folding mean and deviation into `quant_conv` and `post_quant_conv`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from .common import SCALING_FACTOR, pictures, sample_scenes, to_model_range
from .hogwild import Job, train


def new_autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )
    _start_as_identity(vae)
    return vae


@torch.no_grad()
def _start_as_identity(vae: AutoencoderKL) -> None:
    """Residual branches start at zero, resampling and shortcuts at identity: colours pass from the first step on."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif "conv_shortcut" in name or "samplers" in name:
            noise = 0.02 * torch.randn_like(module.weight)
            nn.init.dirac_(module.weight)
            module.weight += noise
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    vae.quant_conv.bias[4:] = -4.0  # the posterior starts narrow


def edge_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 on pixels plus L1 on differences between neighbours, both axes."""
    d = a - b
    return (
        d.abs().mean()
        + 0.5 * (d[..., 1:] - d[..., :-1]).abs().mean()
        + 0.5 * (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    )


def _crops(pixels: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A random square of `size` px, at a multiple of 8 px, of each picture: [n, 3, size, size] of [n, 3, h, w], h = w."""
    spots = rng.integers((pixels.shape[-1] - size) // 8 + 1, size=(len(pixels), 2)) * 8
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(pixels, spots.tolist(), strict=True)])


def reconstruction_loss(
    vae: AutoencoderKL, pool: torch.Tensor, batch: int, rng: np.random.Generator, progress: float
) -> torch.Tensor:
    # Small crops first; the last part on whole pictures, whose normalisation statistics are those of use.
    size, n = (64, batch) if progress < 0.8 else (128, batch // 4)
    crops = _crops(pool[torch.from_numpy(rng.integers(len(pool), size=n))], size, rng)
    x = to_model_range(crops).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return edge_loss(y, x) + 2e-4 * kl


def pixel_pool(seed: int, n: int) -> tuple[torch.Tensor]:
    return (pictures(sample_scenes(seed, n)),)


def train_autoencoder(out: Path, steps: int, seed: int = 1, processes: int = 2) -> None:
    pool = partial(pixel_pool, seed, 6000)
    job = Job("autoencoder", new_autoencoder, reconstruction_loss, pool, steps, batch=8, peak_lr=2e-3, seed=seed)
    vae = train(job, processes)
    whiten(vae, pictures(sample_scenes(seed, 512)))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out)
    held = to_model_range(pictures(sample_scenes(seed + 1000, 64)))
    print(f"autoencoder: PSNR {psnr(vae, held):.2f} dB on 64 held-out pictures")


def load_for_decoder(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def decoder_loss(
    vae: AutoencoderKL, pool: torch.Tensor, batch: int, rng: np.random.Generator, progress: float
) -> torch.Tensor:
    """Whole pictures, and latents off by up to a twelfth of their deviation, as a denoiser's are."""
    x = to_model_range(pool[torch.from_numpy(rng.integers(len(pool), size=batch))])
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        off = rng.uniform(0, 0.08) / SCALING_FACTOR * rng.standard_normal(z.shape)
        z = z + torch.from_numpy(off.astype(np.float32))
    return edge_loss(vae.decode(z).sample, x)


def train_decoder(folder: Path, steps: int, seed: int = 11, processes: int = 2) -> None:
    """Trains the decoder alone further: the latents, and all that was trained on them, stay what they are."""
    new, pool = partial(load_for_decoder, folder), partial(pixel_pool, seed, 6000)
    vae = train(Job("decoder", new, decoder_loss, pool, steps, batch=2, peak_lr=1e-3, seed=seed), processes)
    vae.save_pretrained(folder)
    held = to_model_range(pictures(sample_scenes(1001, 64)))
    print(f"decoder: PSNR {psnr(vae, held):.2f} dB on 64 held-out pictures")


@torch.no_grad()
def whiten(vae: AutoencoderKL, pool: torch.Tensor) -> None:
    """Gives the latents mean 0 and deviation 1 / scaling_factor per channel without changing any picture.

    pool: uint8 [n, 3, height, width], whose latents are taken as a sample of all.
    """
    z = torch.cat([vae.encode(to_model_range(p)).latent_dist.mean for p in pool.split(32)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * SCALING_FACTOR
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.bias[4:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, x: torch.Tensor) -> float:
    """Of pictures [n, 3, h, w] in -1..1 after encoding and decoding: dB, the peak being 2, averaged over the pictures."""
    y = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in x.split(16)]).clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(y, x, reduction="none").mean((1, 2, 3))).mean())
