"""The three text-to-image models: demo-vega trained from nothing, demo-small-sd and demo-tiny-sd distilled from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from .checkpoints import load_encoder, load_weights, write_checkpoint, write_tokenizers
from .diffusion import Pool, Teacher, Tokens, loss_on, make_pool
from .hogwild import Job, train
from .models import TextToNoise, new_sd, new_vega


def context(
    vae: Path, cache: Path, tokenizers: list[Path], pool: int, teacher: Path | None = None, pool_seed: int = 2
) -> tuple[Pool, Tokens, Teacher | None]:
    """What a worker trains on; `teacher` is a checkpoint of the vega kind."""
    pictures, tokens = make_pool(vae, pool, pool_seed, cache), Tokens(tokenizers)
    if teacher is None:
        return pictures, tokens, None
    model = load_weights(new_vega(), teacher).requires_grad_(False).eval()
    return pictures, tokens, Teacher(model, Tokens([teacher / "tokenizer", teacher / "tokenizer_2"]))


def new_model(name: str, start: Path | None = None, teacher: Path | None = None) -> TextToNoise:
    """`name` is 'demo-vega', 'demo-small-sd' or 'demo-tiny-sd'; its weights from the checkpoint `start`, if given.

    demo-vega may start from text encoders alone, a tiny model from a small one's weights; an SD model without a start
    takes its teacher's second text encoder, which has its shape.
    """
    if name == "demo-vega":
        return load_weights(new_vega(), start) if start else new_vega()
    model = new_sd(name.split("-")[1])
    if start:
        return load_weights(model, start)
    if teacher:
        load_encoder(model.encoders[0], teacher / "text_encoder_2")
    return model


def train_base(
    name: str,
    vae: Path,
    cache: Path,
    out: Path,
    steps: int,
    *,
    start: Path | None = None,
    teacher: Path | None = None,
    peak_lr: float = 2e-3,
    pool: int = 40_000,
    processes: int = 2,
    seed: int = 3,
) -> TextToNoise:
    """Trains and writes the checkpoint `out`; with `start`, goes on from that one; with `teacher`, imitates it."""
    kind = "vega" if name == "demo-vega" else "sd"
    new = partial(new_model, name, start, teacher)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizers = write_tokenizers(cache / name, kind)
    make_context = partial(context, vae, cache, tokenizers, pool, teacher)
    make_context()  # encodes the pool once, before the workers start
    job = Job(name, new, loss_on, make_context, steps, batch=32, peak_lr=peak_lr, seed=seed)

    def snapshot(model: nn.Module) -> None:
        write_checkpoint(cache / f"{name}-snapshot", kind, model, vae)

    model = train(job, processes, snapshot)
    write_checkpoint(out, kind, model, vae)
    return model
