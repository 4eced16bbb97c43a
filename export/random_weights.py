"""Weights made up from a seed, for a network of any configuration: benchmarks and tests without a download.

Each tensor has a generator of its own, seeded with the seed, the part and the tensor's published name, so a value depends
neither on the order nor on what else there is. Values are rounded to fp16, as published weights are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint import published_name
from .modules import new_module

if TYPE_CHECKING:
    import torch
    from torch import nn

_SPREAD = 0.05  # of norms about one, and of biases and embeddings about zero


class RandomWeights:
    """A `checkpoint.Loader`. Matrices and kernels are uniform with variance 1 / fan-in, which keeps every layer's outputs
    at the scale of its inputs (LeCun et al. 1998, Efficient BackProp, section 4.6): finite in fp16, and not all alike.
    """

    def __init__(self, seed: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.seed, self._configs = seed, configs

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        module = new_module(part, self._configs[part])
        return {published_name(part, name): tuple(p.shape) for name, p in module.named_parameters()}

    def load(self, part: str) -> nn.Module:
        """In fp16."""
        module = new_module(part, self._configs[part])
        state = {n: self._tensor(published_name(part, n), p, part) for n, p in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        return module

    def _tensor(self, name: str, like: torch.Tensor, part: str) -> torch.Tensor:
        import torch

        digest = hashlib.sha256(f"{self.seed}/{part}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        norm = like.ndim == 1 and name.endswith("weight")
        embedding = "embedding" in name and name.startswith("text_model.")
        spread = _SPREAD if like.ndim == 1 or embedding else 1 / math.sqrt(math.prod(like.shape[1:]))
        half_width = spread * math.sqrt(3)  # of a uniform distribution with that standard deviation
        middle = 1.0 if norm else 0.0
        values = torch.empty(like.shape).uniform_(middle - half_width, middle + half_width, generator=generator)
        return values.half()
