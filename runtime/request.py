"""What is asked of a pipeline, checked against what the model allows before anything runs."""

from __future__ import annotations

import operator
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .rng import MAX_SEED
from .schedulers import get_scheduler

MAX_SAMPLES = 4


@dataclass(frozen=True)
class Limits:
    """What a model allows: steps, guidance and size as (least, most), sizes in px and a multiple of `multiple_px`."""

    steps: tuple[int, int] = (1, 1000)
    guidance: tuple[float, float] = (0.0, 30.0)
    size_px: tuple[int, int] = (64, 2048)
    multiple_px: int = 64

    @classmethod
    def of(cls, written: Mapping[str, Any], multiple_px: int) -> Limits:
        ranges = {k: (written[k][0], written[k][1]) for k in ("steps", "guidance", "size_px") if k in written}
        return cls(**ranges, multiple_px=multiple_px)


@dataclass(frozen=True)
class Request:
    """One generation, checked: sample i of 1 to 4 has seed + i (0 to 999999999999999); width and height in px.

    guidance 1 and less means none. negative None is the model's own default, which may differ from an empty text.
    """

    prompt: str
    negative: str | None
    steps: int
    guidance: float
    scheduler: str
    seed: int
    samples: int
    width: int
    height: int

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.samples)]

    def parameters(self, model: str, version: str, sample: int = 0) -> str:
        """The text that AUTOMATIC1111's web UI writes into a picture and that other tools read."""
        lines = [self.prompt]
        if self.negative is not None:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(
            f"Steps: {self.steps}, Sampler: {self.scheduler}, CFG scale: {self.guidance:g}, Seed: {self.seeds[sample]}, "
            f"Size: {self.width}x{self.height}, Model: {model}, Version: vega-edge {version}"
        )
        return "\n".join(lines)


def make_request(options: Mapping[str, Any], defaults: Mapping[str, Any], limits: Limits) -> Request:
    """The caller's options over the model's defaults; UsageError for what is out of range, of a wrong type or unknown."""
    known = set(Request.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}; there are: {', '.join(sorted(known))}")
    value = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    prompt, negative, name = _text("prompt", value.get("prompt")), value.get("negative"), value["scheduler"]
    samples = _whole("samples", value.get("samples", 1), 1, MAX_SAMPLES)
    seed = _whole("seed", value.get("seed", -1), -1, MAX_SEED - samples + 1)
    return Request(
        prompt=prompt,
        negative=None if negative is None else _text("negative", negative),
        steps=_whole("steps", value["steps"], *limits.steps),
        guidance=_number("guidance", value["guidance"], *limits.guidance),
        scheduler=get_scheduler(_text("scheduler", name)).name,
        seed=secrets.randbelow(2**32) if seed == -1 else seed,
        samples=samples,
        width=_side("width", value["width"], limits),
        height=_side("height", value["height"], limits),
    )


def _text(name: str, got: Any) -> str:
    if not isinstance(got, str):
        raise UsageError(f"{name} must be text, got {type(got).__name__}")
    return re.sub("[\ud800-\udfff]", "\ufffd", got)  # half a surrogate pair, which no encoder and no file takes


def _number(name: str, got: Any, low: float, high: float) -> float:
    if isinstance(got, bool) or not isinstance(got, (int, float)) or not low <= got <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {got!r}")
    return float(got)


def _whole(name: str, got: Any, low: int, high: int) -> int:
    try:
        whole = operator.index(got)  # numpy's whole numbers too
    except TypeError:
        whole = low - 1
    if isinstance(got, bool) or not low <= whole <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {got!r}")
    return whole


def _side(name: str, got: Any, limits: Limits) -> int:
    px = _whole(name, got, *limits.size_px)
    if px % limits.multiple_px:
        below = px // limits.multiple_px * limits.multiple_px
        near = [s for s in (below, below + limits.multiple_px) if limits.size_px[0] <= s <= limits.size_px[1]]
        raise UsageError(
            f"{name} must be a multiple of {limits.multiple_px} px, got {px}; nearest: {' or '.join(map(str, near))}"
        )
    return px
