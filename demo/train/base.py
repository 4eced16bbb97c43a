"""The three text-to-image models: demo-vega and demo-small-sd trained from nothing, demo-tiny-sd from demo-small-sd."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from .checkpoints import load_weights, write_checkpoint, write_tokenizers
from .diffusion import Pool, Tokens, loss_on, make_pool
from .hogwild import Job, train
from .models import TextToNoise, new_sd, new_vega


def context(vae: Path, cache: Path, tokenizers: list[Path], pool: int, pool_seed: int = 2) -> tuple[Pool, Tokens]:
    return make_pool(vae, pool, pool_seed, cache), Tokens(tokenizers)


def new_model(name: str, start: Path | None = None) -> TextToNoise:
    """`name` is 'demo-vega', 'demo-small-sd' or 'demo-tiny-sd'; its weights from the checkpoint `start`, if given.

    A tiny model may start from a small one's.
    """
    model = new_vega() if name == "demo-vega" else new_sd(name.split("-")[1])
    return load_weights(model, start) if start else model


def train_base(
    name: str,
    vae: Path,
    cache: Path,
    out: Path,
    steps: int,
    *,
    start: Path | None = None,
    peak_lr: float = 2e-3,
    pool: int = 40_000,
    processes: int = 2,
    seed: int = 3,
) -> TextToNoise:
    """Trains and writes the checkpoint `out`; with `start`, goes on from that one."""
    kind = "vega" if name == "demo-vega" else "sd"
    new = partial(new_model, name, start)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizers = write_tokenizers(cache / name, kind)
    make_context = partial(context, vae, cache, tokenizers, pool)
    make_context()  # encodes the pool once, before the workers start
    job = Job(name, new, loss_on, make_context, steps, batch=32, peak_lr=peak_lr, seed=seed)

    def snapshot(model: nn.Module) -> None:
        write_checkpoint(cache / f"{name}-snapshot", kind, model, vae)

    model = train(job, processes, snapshot)
    write_checkpoint(out, kind, model, vae)
    return model
