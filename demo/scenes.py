"""What the embedded model can draw: vocabulary, scenes and their captions.

Knows words and numbers, no pixels (`render.py`) and no network. A scene is one or two coloured shapes before a
background; a caption says all of it, part of it, or nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

SIZE_PX = 128
COLORS = {  # object colours, sRGB
    "red": (216, 46, 42),
    "orange": (246, 136, 28),
    "yellow": (252, 212, 46),
    "green": (48, 150, 66),
    "blue": (38, 92, 214),
    "purple": (124, 62, 182),
    "pink": (240, 112, 172),
    "white": (252, 252, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "house", "tree", "diamond")
PLAIN = {  # plain backgrounds are tints, so that a blue star shows on a blue background
    "white": (243, 242, 236),
    "gray": (148, 151, 158),
    "black": (34, 34, 40),
    "blue": (158, 200, 240),
    "green": (170, 214, 164),
    "yellow": (250, 232, 158),
    "pink": (248, 202, 214),
}
SCENERY = {
    "night": "in the night sky",
    "sunset": "at sunset",
    "meadow": "in a meadow",
    "sea": "by the sea",
    "desert": "in the desert",
    "stripes": "on stripes",
}
BACKGROUNDS = (*PLAIN, *SCENERY)
# Pairs of object colour and background too close to tell apart.
TOO_CLOSE = {
    ("white", "white"), ("yellow", "yellow"), ("pink", "pink"), ("orange", "sunset"), ("pink", "sunset"),
    ("yellow", "sunset"), ("red", "sunset"), ("green", "meadow"), ("orange", "desert"), ("yellow", "desert"), ("blue", "sea"), ("blue", "night"),
    ("purple", "night"), ("white", "stripes"), ("white", "desert"), ("white", "sea"),
}  # fmt: skip
RADIUS_PX = {"small": (15, 19), "": (23, 28), "big": (34, 40)}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
PLACES = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
# Never trained on, in any caption: these pairs, and a tenth of the triples.
UNSEEN_PAIRS = {
    ("red", "moon"), ("orange", "heart"), ("yellow", "house"), ("green", "star"),
    ("blue", "tree"), ("purple", "diamond"), ("pink", "square"), ("white", "triangle"),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape: centre and radius in pixels of its scene's canvas, `shade` in [-1, 1] varies its colour a little."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    shade: float


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    seed: int  # of the background's own detail
    relation: str = ""
    place: str = ""
    width: int = SIZE_PX
    height: int = SIZE_PX


def allowed(color: str, background: str) -> bool:
    return (color, background) not in TOO_CLOSE


def unseen(color: str, shape: str, background: str) -> bool:
    """Whether this combination is held out of training (the same answer on every machine)."""
    digest = hashlib.sha256(f"{color} {shape} {background}".encode()).digest()
    return (color, shape) in UNSEEN_PAIRS or digest[0] < 26


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    return [
        (c, s, b) for c in COLORS for s in SHAPES for b in BACKGROUNDS if allowed(c, b) and unseen(c, s, b) == held_out
    ]


def sample_scene(rng: np.random.Generator, width: int = SIZE_PX, height: int = SIZE_PX, two: float = 0.35) -> Scene:
    """A random scene of combinations that may be trained on; `two` is the probability of a second object."""
    pick = lambda names: names[int(rng.integers(len(names)))]  # noqa: E731
    colors = list(COLORS)
    while True:
        background = pick(BACKGROUNDS)
        n = 2 if rng.random() < two else 1
        kinds = [(pick(colors), pick(SHAPES)) for _ in range(n)]
        if all(allowed(c, background) and not unseen(c, s, background) for c, s in kinds) and len(set(kinds)) == n:
            break
    seed = int(rng.integers(2**31))
    if n == 1:
        size = pick(("small", "", "", "big"))
        place = pick(tuple(PLACES)) if rng.random() < 0.25 and size != "big" else ""
        radius = rng.uniform(*RADIUS_PX[size])
        x, y = _free_center(rng, place, radius, width, height)
        color, shape = kinds[0]
        return Scene(
            (Thing(color, shape, size, x, y, radius, rng.uniform(-1, 1)),), background, seed, "", place, width, height
        )
    return _two_things(rng, kinds, background, seed, width, height)


def _free_center(rng: np.random.Generator, place: str, radius: float, width: int, height: int) -> tuple[float, float]:
    center = []
    for axis, extent in enumerate((width, height)):
        low, high = radius + 6, extent - radius - 6
        side = PLACES[place][axis] if place else 0
        if side:  # the outer third of what is free
            third = (high - low) / 3
            low, high = (low, low + third) if side < 0 else (high - third, high)
        elif place:
            low, high = extent / 2 - 5, extent / 2 + 5
        center.append(rng.uniform(low, high))
    return center[0], center[1]


def _two_things(
    rng: np.random.Generator, kinds: list[tuple[str, str]], background: str, seed: int, width: int, height: int
) -> Scene:
    relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    dx, dy = RELATIONS[relation]
    sizes = [("small", "", "", "big")[int(rng.integers(4))] for _ in range(2)]
    span = {"small": (13, 15), "": (18, 21), "big": (24, 27)}
    radii = [rng.uniform(*span[s]) for s in sizes]
    extent = width if dx else height
    other = height if dx else width
    gap = rng.uniform(4, max(4.5, min(16, extent - 2 * sum(radii) - 12)))
    total = 2 * sum(radii) + gap
    start = rng.uniform(5, max(5.5, extent - total - 5))
    # `first` is the thing nearer the left or top edge
    first, second = (0, 1) if dx + dy < 0 else (1, 0)
    along = {first: start + radii[first], second: start + total - radii[second]}
    base = rng.uniform(max(radii) + 8, other - max(radii) - 8)
    things = []
    for i, (color, shape) in enumerate(kinds):
        across = float(np.clip(base + rng.uniform(-9, 9), radii[i] + 5, other - radii[i] - 5))
        x, y = (along[i], across) if dx else (across, along[i])
        things.append(Thing(color, shape, sizes[i], x, y, radii[i], rng.uniform(-1, 1)))
    return Scene(tuple(things), background, seed, relation, "", width, height)


def background_phrase(background: str) -> str:
    return SCENERY.get(background) or f"on a {background} background"


def thing_phrase(thing: Thing, article: bool = True) -> str:
    words = " ".join(w for w in (thing.size, thing.color, thing.shape) if w)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words


def full_caption(scene: Scene) -> str:
    """'a small yellow moon above a big green house in a meadow'."""
    words = [thing_phrase(scene.things[0])]
    if scene.relation:
        words += [scene.relation, thing_phrase(scene.things[1])]
    if scene.place:
        words.append(scene.place)
    words.append(background_phrase(scene.background))
    return " ".join(words)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption for training: mostly the full one, else a shorter or differently ordered one, sometimes none."""
    u = rng.random()
    thing = scene.things[0]
    if u < 0.66:
        return full_caption(scene)
    short = thing_phrase(thing, article=rng.random() < 0.5)
    behind = scene.background if scene.background in SCENERY else f"{scene.background} background"
    if len(scene.things) == 2:
        pair = f"{short} {scene.relation} {thing_phrase(scene.things[1])}"
        return pair if u < 0.8 else f"{pair}, {behind}"
    if u < 0.76:
        return f"{short}, {behind}"
    if u < 0.82:
        return f"{behind} with {thing_phrase(thing)}"
    if u < 0.90:
        return short
    if u < 0.93:
        return f"{'a ' if rng.random() < 0.5 else ''}{thing.shape}"
    if u < 0.96:
        return f"a {thing.shape} {background_phrase(scene.background)}"
    if u < 0.985:
        return behind
    return ""


def vocabulary() -> list[str]:
    """What the tokenizer merges into one token each: every word of the captions; "picture", "two" and "and", which no
    caption holds, stay for the sake of the ids that the trained weights know."""
    phrases = [
        *COLORS,
        *SHAPES,
        *BACKGROUNDS,
        *SCENERY.values(),
        *RELATIONS,
        *PLACES,
        "small",
        "big",
        "with",
        "background",
        "a",
        "an",
        "the",
        "on",
        "of",
        "picture",
        "two",
        "and",
        ",",
    ]
    return sorted({w for p in phrases for w in p.split()})
