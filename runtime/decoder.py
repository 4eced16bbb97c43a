"""Latents to pictures, with the graph that ends in pixels, or with a float decoder of another tool's bundle.

Large ones are decoded in tiles. And the numbers between the autoencoder's latents and the network's: `Scaling`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle import Bundle
from ..engines import Engine, runs_on_cpu
from ..errors import EngineError, NotFiniteError
from ..tiling import TILING
from .parts import Part, Parts
from .tiles import decode_in_tiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaling:
    """The network's latents are (the autoencoder's - mean) / std * factor; mean and std are [1, c or 1, 1, 1]."""

    factor: float
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, config: Mapping[str, Any], sdxl: bool) -> Scaling:
        """Of an autoencoder's configuration, as diffusers' pipelines use it (diffusers 0.42.1); those older than these
        keys mean diffusers' defaults.

        The pipelines of the SDXL kind use `latents_mean` and `latents_std`, one number a channel, if both are there;
        those of the SD kind only `scaling_factor`. Neither uses `shift_factor`.
        """
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not sdxl or mean is None or std is None:
            mean, std = 0.0, 1.0
        shaped = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        return cls(float(config.get("scaling_factor", _default_factor(config))), *shaped)

    @classmethod
    def read(cls, bundle: Bundle, part: str) -> Scaling:
        """Of an autoencoder's configuration in a bundle. BundleError for numbers that can't be used."""
        config = bundle.config(part)
        factor = config.get("scaling_factor", _default_factor(config))
        if not _is_number(factor) or factor <= 0:
            raise bundle.misconfigured(part, "scaling_factor", factor, "a number above 0")
        channels = bundle.number("unet", "in_channels", 64)
        for key, least in (("latents_mean", -np.inf), ("latents_std", 0.0)):
            values = config.get(key)
            fits = isinstance(values, list) and len(values) == channels
            if values is not None and not (fits and all(_is_number(v) and v > least for v in values)):
                kind = "numbers above 0" if key == "latents_std" else "numbers"
                raise bundle.misconfigured(part, key, values, f"null or a list of {channels} {kind}, one a channel")
        return cls.of(config, bundle.sdxl)

    def from_network(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = latents * (self.std / np.float32(self.factor)) + self.mean
        return scaled

    def to_network(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = (latents - self.mean) * (np.float32(self.factor) / self.std)
        return scaled


def _default_factor(config: Mapping[str, Any]) -> float:
    return 1.0 if "decoder_block_out_channels" in config else 0.18215


def _is_number(value: Any) -> bool:
    """Whether it is a number that single precision can hold, not a bool."""
    return type(value) in (int, float) and abs(value) < 1e30


class Decoder:
    """`scale`: pixels a latent, each way. `name`: the bundle's folder, vae_decoder or tiny_vae_decoder."""

    def __init__(self, parts: Parts, name: str = "vae_decoder") -> None:
        self.scale = 2 ** (parts.bundle.levels(name) - 1)
        self.scaling = Scaling.read(parts.bundle, name)
        pixels = f"{name}/pixels.onnx"
        self._bakes_pixels = parts.bundle.has(pixels)
        floats = f"{name}/model.onnx"
        self._part = parts.part(pixels if self._bakes_pixels else floats)
        # Whole numbers can't tell what was no number: there the float graph is asked. Not opened until then.
        self._floats = parts.part(floats) if self._bakes_pixels and parts.bundle.has(floats) else None
        self._engine_name, self._low_memory = parts.engine, parts.low_memory

    def load(self) -> None:
        self._part.load()

    def pixels(self, latents: NDArray[np.float32], tiled: bool = True) -> NDArray[np.uint8]:
        """float32 latents [n, c, h, w] as the network sees them -> sRGB uint8 [n, height, width, 3].

        tiled: whether a large image is cut into tiles; see `Tiling`.
        """
        if not np.isfinite(latents).all():
            raise NotFiniteError(f"{self._engine_name}: the last step's latents are not finite; fewer steps may help")
        height, width = (side * self.scale for side in latents.shape[-2:])
        tile = TILING.tile(self._engine_name, self._low_memory, height, width) if tiled else None
        with self._part.running() as engine:
            if tile:
                return decode_in_tiles(latents, self.scale, lambda part: self._decode(engine, part), tile)
            if self._low_memory or runs_on_cpu(self._engine_name):  # a batch is no faster there, and takes its multiple
                return np.concatenate([self._decode(engine, one[None]) for one in latents])
            return self._decode(engine, latents)

    def _decode(self, engine: Engine, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        if self._bakes_pixels:
            dtype = engine.inputs["latent_sample"].dtype
            pixels: NDArray[np.uint8] = engine.run({"latent_sample": latents.astype(dtype, copy=False)})["pixels"]
            if self._floats and any(_is_blank(picture) for picture in pixels):
                self._check_floats(self._floats, latents)
            return pixels
        sample = self._sample(engine, latents)
        pixels = np.rint(np.clip(sample / 2 + 0.5, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels)

    def _check_floats(self, floats: Part, latents: NDArray[np.float32]) -> None:
        try:
            with floats.running() as engine:
                self._sample(engine, latents)
        except NotFiniteError:
            raise
        except EngineError:  # engines built of a bundle have no such graph
            _log.warning("a picture is of one colour, and %s can't tell whether its decoder failed", self._engine_name)

    def _sample(self, engine: Engine, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        dtype = engine.inputs["latent_sample"].dtype
        unscaled = self.scaling.from_network(latents)
        sample: NDArray[np.float32] = engine.run({"latent_sample": unscaled.astype(dtype, copy=False)})["sample"]
        sample = sample.astype(np.float32, copy=False)
        if not np.isfinite(sample).all():
            raise NotFiniteError(
                f"{self._engine_name}: the decoder gave values that are not finite; it may overflow in fp16: export "
                "it in fp32"
            )
        return sample

    def images(self, latents: NDArray[np.float32]) -> list[Image.Image]:
        return [Image.fromarray(p) for p in self.pixels(latents)]


def _is_blank(picture: NDArray[np.uint8]) -> bool:
    """Of one colour; looks at the first row before the rest."""
    first = picture[0, 0]
    return bool((picture[0] == first).all() and (picture == first).all())
