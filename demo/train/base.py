"""The three text-to-image models, trained from nothing: demo-vega, demo-small-sd and demo-tiny-sd."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from .checkpoints import write_checkpoint, write_tokenizers
from .diffusion import Pool, Tokens, loss_on, make_pool
from .hogwild import Job, train
from .models import TextToNoise, new_sd, new_vega


def context(vae: Path, cache: Path, tokenizers: list[Path], pool: int, pool_seed: int = 2) -> tuple[Pool, Tokens]:
    return make_pool(vae, pool, pool_seed, cache / "latents.pt"), Tokens(tokenizers)


def train_base(
    name: str, vae: Path, cache: Path, out: Path, steps: int, pool: int = 20_000, processes: int = 2, seed: int = 3
) -> TextToNoise:
    """`name` is 'demo-vega', 'demo-small-sd' or 'demo-tiny-sd'."""
    kind = "vega" if name == "demo-vega" else "sd"
    new = new_vega if kind == "vega" else partial(new_sd, name.split("-")[1])
    cache.mkdir(parents=True, exist_ok=True)
    tokenizers = write_tokenizers(cache / name, kind)
    make_context = partial(context, vae, cache, tokenizers, pool)
    make_context()  # encodes the pool once, before the workers start
    job = Job(name, new, loss_on, make_context, steps, batch=32, peak_lr=2e-3, seed=seed)

    def snapshot(model: nn.Module) -> None:
        write_checkpoint(cache / f"{name}-snapshot", kind, model, vae)

    model = train(job, processes, snapshot)
    write_checkpoint(out, kind, model, vae)
    return model
