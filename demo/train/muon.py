"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised, for weight matrices.

A small model on a CPU sees few updates; this optimizer needs fewer than Adam. Convolutions count as matrices
[out, in * kh * kw]. Vectors (biases, norms) and embeddings are left to Adam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps, coefficients of the source above."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon:
    """Muon for matrices, AdamW for the rest. `lr` is Adam's; Muon's is `ratio` times that, scaled by the matrix's shape."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, ratio: float = 10.0, weight_decay: float = 0.01
    ) -> None:
        named = [(n, p) for n, p in named if p.requires_grad]
        self.matrices = [p for n, p in named if p.ndim >= 2 and "embedding" not in n]
        chosen = {id(p) for p in self.matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0) if rest else None
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.ratio, self.weight_decay = ratio, weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self.adam:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        for p, m in zip(self.matrices, self.momenta, strict=True):
            if p.grad is None:
                continue
            m.lerp_(p.grad, 0.05)
            update = orthogonalize(p.grad.lerp(m, 0.95).flatten(1)).view_as(p)
            rows, columns = p.shape[0], p[0].numel()
            p.mul_(1 - lr * self.weight_decay)
            p.sub_(update, alpha=lr * self.ratio * 0.2 * max(rows, columns) ** 0.5 / 10)

    def zero_grad(self) -> None:
        if self.adam:
            self.adam.zero_grad()
        for p in self.matrices:
            p.grad = None
