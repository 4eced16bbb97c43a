"""What stands where: a second task for the text encoders while they are trained.

CLIP's encoders know what a sentence means before a diffusion model meets them; ours start from nothing, and the noise
alone did not teach them in 14,000 updates that "a star above a heart" is not "a heart above a star": a caption with its
relation turned round gave the same loss. So the padding after the caption is made to hold the answer, which causal
attention lets it see: at even positions the colour and shape of the thing nearer the top or left, at odd ones of the
other, and at both whether they stand above each other or side by side, or where a single one stands. A linear reader of
each encoder's states is asked for them; it is thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from ..scenes import COLORS, PLACES, RELATIONS, SHAPES, Scene

FIRST = 32  # the first position that asks: longer than any caption, so that it is padding
# Colour or unsaid; shape or unsaid; nothing, one of two axes, or a place.
QUESTIONS = (1 + len(COLORS), 1 + len(SHAPES), 1 + 2 + len(PLACES))
ANSWERS = sum(QUESTIONS)


def answers(scene: Scene, caption: str) -> list[tuple[int, int, int]]:
    """For the first and the second thing: its colour, its shape, and axis or place, 0 for what the caption does not say."""
    if not scene.relation:
        place = 3 + list(PLACES).index(scene.place) if scene.place and scene.place in caption else 0
        return 2 * [(*_said(scene, 0, caption), place)]
    dx, dy = RELATIONS[scene.relation]
    order = (0, 1) if dx + dy < 0 else (1, 0)
    return [(*_said(scene, i, caption), 1 if dy else 2) for i in order]


def _said(scene: Scene, i: int, caption: str) -> tuple[int, int]:
    thing = scene.things[i]
    color = f"{thing.color} {thing.shape}" in caption
    shape = thing.shape in caption.replace(",", " ").split()
    return (1 + list(COLORS).index(thing.color)) * color, (1 + SHAPES.index(thing.shape)) * shape


def placement_loss(
    readers: Iterable[nn.Module], text: torch.Tensor, scenes: list[Scene], captions: list[str]
) -> torch.Tensor:
    """Cross entropy of the readers' answers; `text` are the encoders' states side by side, [n, 77, d]."""
    told = torch.tensor([answers(s, c) for s, c in zip(scenes, captions, strict=True)])  # [n, 2, 3]
    told = told[:, torch.arange(FIRST, text.shape[1]) % 2]  # [n, positions, 3]
    loss, at = text.new_zeros(()), 0
    for reader in readers:
        width = reader.in_features
        read = reader(text[:, FIRST:, at : at + width]).split(QUESTIONS, -1)
        loss = loss + sum(F.cross_entropy(r.flatten(0, 1), told[..., k].flatten()) for k, r in enumerate(read))
        at += width
    return loss
