"""What does a picture show? A programmatic checker of colour, shape, background and relation; it learns nothing.

A thing is a connected region whose colours do not occur along the picture's border, which is all background. Its
colour is the nearest named one, its shape the outline it overlaps best, and the background the kind whose own
renderings have the most similar border.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .render import background, mask
from .scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Scene, Thing

_BORDER = 4  # pixels
_GRID = 40  # side of the normalised masks that are compared
_SMALLEST = 70  # pixels; less is noise, a background star or a leftover of its stripes


@dataclass(frozen=True)
class Seen:
    """One thing found: its area and centre in pixels, and how well it fits its shape (overlap, 0..1)."""

    color: str
    shape: str
    fit: float
    area: int
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    background: str
    things: tuple[Seen, ...]  # largest first


def _perceptual(rgb: NDArray[np.floating]) -> NDArray[np.float32]:
    """sRGB 0..255 [..., 3] to Oklab (Ottosson 2020), where distances look alike."""
    c = np.asarray(rgb, np.float32) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((np.maximum(c, 0.04045) + 0.055) / 1.055) ** 2.4)
    lms = c @ np.float32(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(lms) @ np.float32(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def _normalized(region: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The region's mask scaled (aspect kept) into a centred square of side _GRID."""
    ys, xs = np.nonzero(region)
    crop = region[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
    zoom = _GRID / max(crop.shape)
    scaled = ndimage.zoom(crop, zoom, order=1, grid_mode=True, mode="grid-constant")
    out = np.zeros((_GRID + 2, _GRID + 2), np.float32)
    h, w = scaled.shape
    y, x = (_GRID + 2 - h) // 2, (_GRID + 2 - w) // 2
    out[y : y + h, x : x + w] = scaled
    return out


@lru_cache(maxsize=1)
def _templates() -> dict[str, NDArray[np.float32]]:
    return {s: _normalized(mask(Thing("", s, "", 64, 64, 40, 0), 128, 128) > 0.5) for s in SHAPES}


def _overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _border(picture: NDArray[np.floating]) -> NDArray[np.floating]:
    """The pixels of the border ring, [n, 3]."""
    b = _BORDER
    sides = (picture[:b], picture[-b:], picture[b:-b, :b], picture[b:-b, -b:])
    return np.concatenate([s.reshape(-1, 3) for s in sides])


def _profile(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """What tells backgrounds apart: colour down the left and right edge in eight bands, and the spread along the top."""
    b = _BORDER
    edge = np.median(np.concatenate([lab[:, :b], lab[:, -b:]], 1), 1)
    bands = np.stack([np.median(p, 0) for p in np.array_split(edge, 8)])
    spread = np.median(np.abs(lab[:b] - np.median(lab[:b], (0, 1))), 0).sum()
    return np.append(bands.ravel(), spread).astype(np.float32)


@lru_cache(maxsize=4)
def _profiles(width: int, height: int) -> NDArray[np.float32]:
    """Profiles of 32 renderings of each background, [backgrounds, 32, features]."""
    return np.stack([[_profile(_perceptual(background(b, s, width, height))) for s in range(32)] for b in BACKGROUNDS])


def _foreground(lab: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels whose colour is far from every colour of the border."""
    ring = _border(lab)
    keys = np.unique(np.round(ring / 0.02).astype(np.int32), axis=0, return_counts=True)
    palette = (keys[0][keys[1] >= 3] * 0.02).astype(np.float32)  # colours that occur more than once or twice
    distance = np.full(lab.shape[:2], np.inf, np.float32)
    for color in palette:
        np.minimum(distance, ((lab - color) ** 2).sum(-1), out=distance)
    return distance > 0.065**2


def read(picture: NDArray[np.uint8]) -> Reading:
    """Reads an sRGB uint8 picture [height, width, 3]."""
    lab = _perceptual(picture)
    h, w = lab.shape[:2]
    distance = np.abs(_profiles(w, h) - _profile(lab)).sum(-1).min(-1)
    labels, n = ndimage.label(ndimage.binary_opening(_foreground(lab), iterations=1))
    names = list(COLORS)
    palette = _perceptual(np.array([COLORS[c] for c in names]))
    things = []
    for k in range(1, n + 1):
        region = labels == k
        area = int(region.sum())
        if area < _SMALLEST:
            continue
        inside = ndimage.binary_erosion(region) if area > 200 else region
        color = np.median(lab[inside if inside.any() else region], 0)
        fits = {s: _overlap(_normalized(region), t) for s, t in _templates().items()}
        shape = max(fits, key=lambda s: fits[s])
        y, x = ndimage.center_of_mass(region)
        nearest = names[int(((palette - color) ** 2).sum(-1).argmin())]
        things.append(Seen(nearest, shape, fits[shape], area, float(x), float(y)))
    things.sort(key=lambda t: -t.area)
    return Reading(BACKGROUNDS[int(distance.argmin())], tuple(things))


@dataclass(frozen=True)
class Score:
    color: bool
    shape: bool
    background: bool
    relation: bool

    @property
    def all(self) -> bool:
        return self.color and self.shape and self.background and self.relation


def score(picture: NDArray[np.uint8], scene: Scene) -> Score:
    """Holds a picture against the scene it was asked for: as many things, each with its colour and shape, related so."""
    seen = read(picture)
    wanted = scene.things
    if len(seen.things) != len(wanted):
        return Score(False, False, seen.background == scene.background, False)
    things = list(seen.things)
    relation = True
    if scene.relation:
        axis = RELATIONS[scene.relation]
        things.sort(key=lambda t: -(t.x * axis[0] + t.y * axis[1]))  # the first thing is furthest along the relation
        delta = np.array([things[0].x - things[1].x, things[0].y - things[1].y])
        relation = bool(delta @ axis > 0 and abs(delta @ axis) >= abs(delta @ axis[::-1]))
    return Score(
        color=all(a.color == b.color for a, b in zip(things, wanted, strict=True)),
        shape=all(a.shape == b.shape for a, b in zip(things, wanted, strict=True)),
        background=seen.background == scene.background,
        relation=relation,
    )
