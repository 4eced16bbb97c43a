"""The text encoders' own training, before they meet a U-Net: captions and what they say, no pictures (`placement.py`).

For some hundred updates nothing seems to happen, then one encoder after the other finds out what a relation is. Within
the U-Net's training, where the same task is a small part of the loss, that did not happen in 1,400 updates.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from ..scenes import caption, sample_scene
from .checkpoints import load_weights, save_half, write_tokenizers
from .common import Log, learning_rate
from .diffusion import Tokens
from .models import TextToNoise, new_vega
from .muon import Muon
from .placement import FIRST, placement_loss

PARTS = ("text_encoder", "text_encoder_2")
KEEP = 0.3


def train_encoders(
    out: Path, steps: int, *, start: Path | None = None, peak_lr: float = 2e-3, batch: int = 64, seed: int = 4
) -> None:
    """Writes demo-vega's encoders to `out`. From the checkpoint `start`, they stay close to what its U-Net has learned to
    read; from nothing, they only have the task."""
    torch.manual_seed(seed)
    model = load_weights(new_vega(), start) if start else new_vega()
    before = load_weights(new_vega(), start).eval() if start else None
    optimizer = Muon([*model.encoders.named_parameters(), *model.readers.named_parameters()], peak_lr)
    rng, log = np.random.default_rng(seed), Log("text-encoders", steps)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens(write_tokenizers(Path(folder), "vega"))
    for step in range(steps):
        scenes = [sample_scene(rng, two=0.8) for _ in range(batch)]
        captions = [caption(s, rng) for s in scenes]
        ids = tokens(captions)
        text, pooled = model.encode(ids)
        loss = placement_loss(model.readers, text, scenes, captions)
        total = loss + KEEP * _drift(before, ids, text, pooled) if before else loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step(learning_rate(step, steps, peak_lr))
        log(step, loss.item())
    for encoder, name in zip(model.encoders, PARTS, strict=True):
        save_half(encoder, out / name)


def _drift(before: TextToNoise, ids: list[torch.Tensor], text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """How far the states that a U-Net reads have moved, but for the padding's, as a share of their variance."""
    with torch.no_grad():
        old, old_pooled = before.encode(ids)
    return (text - old)[:, :FIRST].square().mean() / old.var() + (
        pooled - old_pooled
    ).square().mean() / old_pooled.var()
