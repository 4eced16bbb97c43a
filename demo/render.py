"""Scenes to antialiased pictures, with Pillow and numpy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .scenes import COLORS, PLAIN, Scene, Thing

_OVERSAMPLE = 4


def _arc(cx: float, cy: float, r: float, start: float, stop: float, n: int = 48) -> list[tuple[float, float]]:
    a = np.linspace(np.deg2rad(start), np.deg2rad(stop), n)
    return list(zip(cx + r * np.cos(a), cy + r * np.sin(a), strict=True))


def _regular(angles: NDArray[np.float64], radii: NDArray[np.float64]) -> list[tuple[float, float]]:
    a = np.deg2rad(angles)
    return list(zip(radii * np.sin(a), -radii * np.cos(a), strict=True))


@lru_cache(maxsize=32)
def outline(shape: str) -> NDArray[np.float64]:
    """The shape as a polygon [n, 2], y down, its bounding box centred on 0 and its longer side 2."""
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    points: dict[str, list[tuple[float, float]]] = {
        "circle": _arc(0, 0, 1, 0, 357, 120),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1.1, 0.9), (-1.1, 0.9)],
        "star": _regular(np.arange(10) * 36.0, np.where(np.arange(10) % 2, 0.45, 1.0)),
        "heart": list(zip(16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)), strict=True)),
        "moon": _arc(0, 0, 1, 40, 320, 90) + _arc(0.52, 0, 0.70, 293, 67, 60),
        "house": [(-0.8, 1), (-0.8, -0.05), (-1.05, -0.05), (0, -1), (0.4, -0.63), (0.4, -0.95), (0.7, -0.95), (0.7, -0.36), (1.05, -0.05), (0.8, -0.05), (0.8, 1), (0.25, 1), (0.25, 0.4), (-0.25, 0.4), (-0.25, 1)],
        "tree": [(0, -1), (0.55, -0.3), (0.3, -0.3), (0.85, 0.5), (0.18, 0.5), (0.18, 1), (-0.18, 1), (-0.18, 0.5), (-0.85, 0.5), (-0.3, -0.3), (-0.55, -0.3)],
        "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    }  # fmt: skip
    p = np.asarray(points[shape], dtype=np.float64)
    low, high = p.min(0), p.max(0)
    p = (p - (low + high) / 2) / ((high - low).max() / 2)
    p.setflags(write=False)
    return p


def mask(thing: Thing, width: int, height: int) -> NDArray[np.float32]:
    """Coverage of each pixel in [0, 1], float32 [height, width]. The square and circle are drawn a little smaller, to look alike in size."""
    scale = {"square": 0.84, "circle": 0.92}.get(thing.shape, 1.0) * thing.radius
    canvas = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    p = (outline(thing.shape) * scale + (thing.x, thing.y)) * _OVERSAMPLE
    ImageDraw.Draw(canvas).polygon([tuple(q) for q in p], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLE), np.float32) / 255


def background(name: str, seed: int, width: int, height: int) -> NDArray[np.float32]:
    """A background in sRGB 0..255, float32 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]

    def blend(*stops: tuple[float, float, float]) -> NDArray[np.float32]:
        at = np.linspace(0, 1, len(stops))
        jitter = rng.uniform(-8, 8, 3)
        c = [np.interp(y[:, 0, 0], at, [s[k] + jitter[k] for s in stops]) for k in range(3)]
        return np.repeat(np.stack(c, -1).astype(np.float32)[:, None], width, 1)

    def hills(top: float, swing: float, waves: float) -> NDArray[np.float32]:
        line = (
            top
            + rng.uniform(-0.07, 0.07)
            + sum(swing / k * np.sin(2 * np.pi * (waves * k * x + rng.random())) for k in (1, 2))
        )
        return np.clip((y - line) * height + 0.5, 0, 1).astype(np.float32)

    if name in PLAIN:
        c = np.asarray(PLAIN[name], np.float32)
        light = rng.uniform(4, 11) * (0.5 - y) + rng.uniform(-8, 8) * (x - 0.5)
        return np.broadcast_to(c + light, (height, width, 3)).astype(np.float32)
    if name == "night":
        out = blend((14, 18, 52), (34, 42, 96))
        glow = np.zeros((height, width, 1), np.float32)
        for _ in range(int(rng.integers(6, 12))):
            sx, sy, r = rng.uniform(3, width - 3), rng.uniform(3, height - 3), rng.uniform(0.9, 1.7)
            d2 = (x * (width - 1) - sx) ** 2 + (y * (height - 1) - sy) ** 2
            glow = np.maximum(glow, np.exp(-d2 / (2 * r * r)))
        return out + glow * (np.float32((235, 235, 205)) - out)
    if name == "sunset":
        return blend((92, 58, 128), (206, 92, 118), (250, 158, 92), (254, 206, 130))
    if name == "stripes":
        n, phase = rng.integers(4, 7), rng.random()
        wave = np.clip(np.sin(2 * np.pi * (n * x + phase)) * width / (2.2 * n) + 0.5, 0, 1)
        a, b = np.float32((244, 240, 230)), np.float32((176, 206, 226))
        return np.broadcast_to(a + wave * (b - a), (height, width, 3)).astype(np.float32)
    sky, ground, swing, waves = {
        "meadow": (((150, 206, 244), (214, 236, 250)), ((122, 192, 84), (84, 160, 62)), 0.05, 0.8),
        "sea": (((168, 214, 244), (226, 240, 248)), ((54, 140, 190), (26, 88, 150)), 0.012, 3.0),
        "desert": (((196, 224, 240), (248, 236, 214)), ((236, 196, 128), (214, 160, 92)), 0.06, 0.7),
    }[name]
    out = blend(*sky)
    cover = hills(0.62, swing, waves)
    out = out + cover * (blend(*ground) - out)
    if name == "meadow":  # a nearer, darker hill
        out = out + hills(0.84, 0.05, 0.9) * (np.float32((74, 148, 58)) - out)
    return out


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene as sRGB uint8 [height, width, 3]."""
    out = background(scene.background, scene.seed, scene.width, scene.height)
    y = np.arange(scene.height, dtype=np.float32)[:, None, None]
    for thing in scene.things:
        light = 14 * np.clip((thing.y - y) / thing.radius, -1, 1) + 6 * thing.shade
        color = np.clip(np.asarray(COLORS[thing.color], np.float32) + light, 0, 255)
        out = out + mask(thing, scene.width, scene.height)[..., None] * (color - out)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
