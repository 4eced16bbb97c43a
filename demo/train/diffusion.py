"""Training a text-to-noise network on cached latents: DDPM's loss (arXiv:2006.11239) with weights after
min-SNR (arXiv:2303.09556), noise prediction, scaled-linear betas."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from ..scenes import Scene, caption
from .common import SCALING_FACTOR, pictures, sample_scenes, to_model_range
from .models import BETAS, TextToNoise, load_tokenizer
from .placement import placement_loss

TWO = 0.55  # share of scenes with two things, which take longer to learn
PLACEMENT = 0.01  # weight of the text encoders' second task
SIZES = (((128, 128), 0.92), ((192, 128), 0.04), ((128, 192), 0.04))  # width and height in pixels, share of the batches


@lru_cache(maxsize=1)
def alphas_cumprod() -> torch.Tensor:
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@dataclass
class Pool:
    """Scenes and their scaled latents, one entry a picture size."""

    scenes: list[list[Scene]]
    latents: list[torch.Tensor]

    def batch(self, n: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Scene], list[str]]:
        """Latents float32 [n, c, h, w], their scenes, and a caption each."""
        which = int(rng.choice(len(SIZES), p=[share for _, share in SIZES]))
        index = rng.integers(len(self.scenes[which]), size=n)
        scenes = [self.scenes[which][i] for i in index]
        return self.latents[which][index].float(), scenes, [caption(s, rng) for s in scenes]


def _fingerprint(vae: AutoencoderKL) -> str:
    weights = nn.utils.parameters_to_vector([*vae.encoder.parameters(), *vae.quant_conv.parameters()])
    return hashlib.sha256(weights.detach().numpy().tobytes()).hexdigest()[:12]


@torch.no_grad()
def make_pool(vae_folder: Path, n: int, seed: int, cache: Path) -> Pool:
    """Renders and encodes `n` pictures (fewer of the long formats), once: `cache` keeps the latents of this encoder."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    file = cache / f"latents-{n}-{seed}-{TWO}-{_fingerprint(vae)}.pt"
    counts = [n if share > 0.5 else n // 12 for _, share in SIZES]
    scenes = [sample_scenes(seed, k, w, h, TWO) for ((w, h), _), k in zip(SIZES, counts, strict=True)]
    if not file.exists():
        latents = [
            torch.cat([vae.encode(to_model_range(pictures(group[i : i + 32]))).latent_dist.mean.half() * SCALING_FACTOR for i in range(0, len(group), 32)])
            for group in scenes
        ]  # fmt: skip
        torch.save(latents, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return Pool(scenes, torch.load(file))


class Tokens:
    """Captions to the ids of each encoder's tokenizer."""

    def __init__(self, folders: list[Path]) -> None:
        self.tokenizers = [load_tokenizer(f) for f in folders]
        self.cache: dict[str, list[torch.Tensor]] = {}

    def __call__(self, captions: list[str]) -> list[torch.Tensor]:
        new = sorted(set(captions) - self.cache.keys())
        if new:
            ids = [
                t(new, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
                for t in self.tokenizers
            ]
            self.cache.update({c: [i[k] for i in ids] for k, c in enumerate(new)})
        return [torch.stack([self.cache[c][k] for c in captions]) for k in range(len(self.tokenizers))]


def sample_timesteps(n: int, rng: np.random.Generator) -> torch.Tensor:
    """Uniform, with three in ten from the noisier half, where a picture's layout is decided."""
    low = np.where(rng.random(n) < 0.3, 500, 0)
    return torch.from_numpy(rng.integers(low, 1000))


def weights(abar: torch.Tensor) -> torch.Tensor:
    """Of the squared error of predicted noise: min-SNR's below noise of the signal's size, and above it more than its 1,
    which leaves next to nothing to where the layout is decided: 1 / sqrt(SNR), which makes all timesteps' losses alike.
    """
    snr = abar / (1 - abar)
    return snr.clamp(max=5) / snr * snr.clamp(max=1).rsqrt()


def conditioning(
    model: TextToNoise, tokens: Tokens, captions: list[str], dropped: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The encoders' states, then what the network is told, nothing where `dropped`: zeros for the SDXL kind
    (force_zeros_for_empty_prompt); the SD kind's are empty captions already ."""
    text, pooled = model.encode(tokens(captions))
    if pooled is None:
        return text, text, None
    keep = torch.from_numpy(~dropped).float()
    return text, text * keep[:, None, None], pooled * keep[:, None]


@dataclass
class Teacher:
    """A trained network with its tokenizers, to be imitated."""

    model: TextToNoise
    tokens: Tokens


def loss_on(
    model: TextToNoise,
    pool: Pool,
    tokens: Tokens,
    teacher: Teacher | None,
    batch: int,
    rng: np.random.Generator,
    progress: float,
) -> torch.Tensor:
    """The weighted error of the predicted noise; with a teacher, of the teacher's prediction instead (BK-SDM's output
    distillation, arXiv:2305.15798, without its other terms): the true noise is a sample whose mean the teacher has
    learned, and over a short training the variance is what holds a student back."""
    abar = alphas_cumprod()
    x0, scenes, captions = pool.batch(batch, rng)
    dropped = rng.random(batch) < 0.1
    t = sample_timesteps(batch, rng)
    a = abar[t][:, None, None, None]
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    target = noise
    if teacher:
        with torch.no_grad():
            _, text, pooled = conditioning(teacher.model, teacher.tokens, captions, dropped)
            target = teacher.model.predict(x, t, text, pooled)
    if not model.sdxl:  # guidance compares with the empty caption
        captions = ["" if d else c for c, d in zip(captions, dropped, strict=True)]
    states, text, pooled = conditioning(model, tokens, captions, dropped)
    error = model.predict(x, t, text, pooled) - target
    where = placement_loss(model.readers, states, scenes, captions)
    return (error.square() * weights(a)).mean() + PLACEMENT * where
