"""What is known of one built engine, which TensorRT calls a plan. Knows no TensorRT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from .. import records


@dataclass(frozen=True)
class PlanLora:
    sha256: str
    strength: float


@dataclass(frozen=True)
class Plan:
    """One built engine, and everything that its `key` covers.

    graph: 'unet/model.onnx'; graph_hash: of it and its weights; loras: that changed these, in the order they were added.
    targets: 'sm_89', or 'ampere+' for every RTX GPU from Ampere on. profile: input -> [least, best, most] shape, of
    every input with a free axis. flags: static, refit, stripped, weight-streaming. unit_px: pixels for each step of its
    inputs' height and width. pictures: least, best and most at once, which guidance may double in the U-Net's profile; ()
    where an earlier version built it. revision: plan_store's `REVISION` that it was built with. bytes and sha256 are of
    the file.
    """

    file: str
    sha256: str
    bytes: int
    graph: str
    graph_hash: str
    library: str
    version: str
    targets: tuple[str, ...]
    profile: Mapping[str, tuple[tuple[int, ...], ...]]
    precision: str = "graph"
    flags: tuple[str, ...] = ()
    loras: tuple[PlanLora, ...] = ()
    seconds: float = 0.0
    unit_px: int = 1
    pictures: tuple[int, ...] = ()
    revision: int = 0

    @property
    def key(self) -> str:
        """Hex; two plans share it only if one can stand for the other."""
        unkeyed = ("file", "sha256", "bytes", "seconds", "unit_px", "pictures")
        facts = {k: v for k, v in records.encode(self).items() if k not in unkeyed}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def part_of(graph: str) -> str:
    return graph.split("/")[0]
