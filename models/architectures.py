"""The exact networks of the models, as data: their diffusers configurations, and how many weights each has.

With these a single-file checkpoint, which holds weights only, becomes a diffusers model, and random weights get the
shapes of the real ones, without a download. `configs/clip-merges.txt` is CLIP's vocabulary (OpenAI's CLIP, MIT licence):
both of SDXL's tokenizers and SD's are made from it. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records

CONFIGS = Path(__file__).parent / "configs"
MERGES = CONFIGS / "clip-merges.txt"


@dataclass(frozen=True)
class Architecture:
    """pipeline: diffusers' class. parts, scheduler: names of files in `configs/`. parameters: weights of each part."""

    name: str
    pipeline: str
    parts: Mapping[str, str]
    scheduler: str
    parameters: Mapping[str, int]

    def config(self, part: str) -> dict[str, Any]:
        return read_config(self.parts[part])


@dataclass(frozen=True)
class _Entry:
    pipeline: str
    parts: Mapping[str, str]
    scheduler: str


@dataclass(frozen=True)
class _Table:
    """`parameters` counts each configuration once; architectures share text encoders and autoencoders."""

    architectures: Mapping[str, _Entry]
    parameters: Mapping[str, int]


def architectures() -> dict[str, Architecture]:
    """All of them by name."""
    text = (CONFIGS / "architectures.json").read_text(encoding="utf-8")
    table = records.decode(_Table, records.parse(text))
    return {
        name: Architecture(
            name,
            entry.pipeline,
            entry.parts,
            entry.scheduler,
            {part: table.parameters[file] for part, file in entry.parts.items()},
        )
        for name, entry in table.architectures.items()
    }


def read_config(name: str) -> dict[str, Any]:
    """A file of `configs/`, without its suffix."""
    values: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return values
