"""The prompts that the embedded models are measured on, and the checker's judgement of a picture that one of them gave.

Knows scenes and pictures; no model, and no table of results.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..demo.check import read, score
from ..demo.render import render
from ..demo.scenes import (
    COLORS,
    PLAIN,
    SCENERY,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    combinations,
    full_caption,
    sample_scene,
)

_SEEDS = {"seen": 101, "unseen": 102, "two": 103, "short": 105}
KINDS = tuple(_SEEDS)
# Scenery as one says it; the captions of the training call the night sky 'night' where it stands alone.
_ALONE = {
    **{name: name for name in SCENERY},
    "night": "night sky",
    **{name: f"{name} background" for name in PLAIN},
}


@dataclass(frozen=True)
class Asked:
    """A prompt with what its picture is held against: all of a scene; or, where it says less, only what it names.

    color, shape, background: None where a short prompt leaves them open. thing: whether something must be drawn at all.
    """

    text: str
    scene: Scene | None = None
    color: str | None = None
    shape: str | None = None
    background: str | None = None
    thing: bool = True


@dataclass(frozen=True)
class Judged:
    """What is right; None for what the prompt leaves open. fit: overlap with the ideal outline, 0 to 1, 0 if wrong."""

    color: bool | None
    shape: bool | None
    background: bool | None
    fit: float | None
    all: bool


def prompts(kind: str, count: int) -> list[Asked]:
    """Those of a row, of one of KINDS: the same for every row of that kind."""
    if kind == "short":
        rng = np.random.default_rng(_SEEDS[kind])
        return [_short(i, rng) for i in range(count)]
    return [Asked(full_caption(scene), scene) for scene in scenes(kind, count)]


def scenes(kind: str, count: int) -> list[Scene]:
    """What the prompts of the other kinds ask for in full: all that is said of them is asked, the rest is left at 0."""
    rng = np.random.default_rng(_SEEDS[kind])
    if kind == "two":
        return [sample_scene(rng, two=1.0) for _ in range(count)]
    combos = combinations(held_out=kind == "unseen")
    picks = [combos[i % len(combos)] for i in rng.permutation(max(count, len(combos)))[:count]]
    sizes = ("small", "", "", "big")
    return [Scene((Thing(c, s, sizes[int(rng.integers(4))], 0, 0, 0, 0),), b, 0) for c, s, b in picks]


def _short(i: int, rng: np.random.Generator) -> Asked:
    """Of ten: three such as 'a star', three such as 'red heart', three backgrounds alone, and one that is empty."""
    kind, n = i % 10, int(rng.integers(2**31))
    shape = SHAPES[n % len(SHAPES)]
    if kind == 0:
        return Asked("")  # trained on pictures that all have something in them
    if kind < 4:
        return Asked(f"a {shape}", shape=shape)
    if kind < 7:
        seen = [color for color in COLORS if (color, shape) not in UNSEEN_PAIRS]
        color = seen[n // len(SHAPES) % len(seen)]
        return Asked(f"{color} {shape}", color=color, shape=shape)
    background = list(_ALONE)[n % len(_ALONE)]
    return Asked(_ALONE[background], background=background, thing=False)


def judge(picture: NDArray[np.uint8], asked: Asked) -> Judged:
    """What an sRGB picture [height, width, 3] shows of what was asked; of a short prompt, its largest thing counts."""
    reading = read(picture)
    fit: float | None
    if asked.scene:
        found = score(picture, asked.scene)
        fit = reading.things[0].fit if found.shape else 0.0
        return Judged(found.color, found.shape, found.background, fit, found.all)
    thing = reading.things[0] if reading.things else None
    color = None if asked.color is None else thing is not None and thing.color == asked.color
    shape = None if asked.shape is None else thing is not None and thing.shape == asked.shape
    background = None if asked.background is None else reading.background == asked.background
    drawn = thing is not None or not asked.thing
    fit = None if shape is None else thing.fit if shape and thing else 0.0
    return Judged(color, shape, background, fit, drawn and False not in (color, shape, background))


def ceiling(count: int) -> tuple[float, float]:
    """The checker on clean renderings, per cent all right: one thing, two things."""
    rng = np.random.default_rng(104)
    right = []
    for two in (0.0, 1.0):
        drawn = [sample_scene(rng, two=two) for _ in range(count)]
        right.append(100 * np.mean([score(render(s), s).all for s in drawn]))
    return float(right[0]), float(right[1])
