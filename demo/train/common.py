"""What every training stage shares: pools of pictures, the learning-rate curve, the moving average, a log line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from ..render import render
from ..scenes import Scene, sample_scene

SCALING_FACTOR = (
    0.5  # latents are whitened to standard deviation 2, so a runtime that forgets the factor is seen at once
)


def sample_scenes(seed: int, n: int, width: int = 128, height: int = 128, two: float = 0.35) -> list[Scene]:
    """`two`: the share of scenes with two things."""
    rng = np.random.default_rng([seed, width, height])
    return [sample_scene(rng, width, height, two) for _ in range(n)]


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """uint8 [n, 3, height, width]."""
    return torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).contiguous()


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Of update `step`, 0 to total - 1: `warmup` updates linearly up to `peak`, then half a cosine down to nothing."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Ema:
    """Exponential moving average of a module's parameters, its memory growing from short to `decay`."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.999) -> None:
        self.live = list(parameters)
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)


class Log:
    """One line every `every` calls: step, mean loss since the last line, calls a second."""

    def __init__(self, stage: str, total: int, every: int = 50) -> None:
        self.stage, self.total, self.every = stage, total, every
        self.start = self.last = time.perf_counter()
        self.sum, self.calls = 0.0, 0

    def __call__(self, step: int, loss: float, note: str = "") -> None:
        self.sum += loss
        self.calls += 1
        if self.calls % self.every:
            return
        now = time.perf_counter()
        print(
            f"{self.stage} {step}/{self.total} loss {self.sum / self.every:.5f} "
            f"{self.every / (now - self.last):.2f} steps/s {now - self.start:.0f} s {note}",
            file=sys.stderr,
            flush=True,
        )
        self.sum, self.last = 0.0, now
