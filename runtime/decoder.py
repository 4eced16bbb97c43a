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
    def of(cls, config: Mapping[str, Any]) -> Scaling:
        """Of an autoencoder's configuration; those older than these keys mean diffusers' defaults."""
        default = 1.0 if "decoder_block_out_channels" in config else 0.18215
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not (mean and std):  # only some fine-tuned SDXL autoencoders have them, one a channel, both or none
            mean, std = config.get("shift_factor") or 0.0, 1.0
        shaped = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        return cls(float(config.get("scaling_factor", default)), *shaped)

    def from_network(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = latents * (self.std / np.float32(self.factor)) + self.mean
        return scaled

    def to_network(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = (latents - self.mean) * (np.float32(self.factor) / self.std)
        return scaled


class Decoder:
    """`scale`: pixels a latent, each way. `name`: the bundle's folder, vae_decoder or tiny_vae_decoder."""

    def __init__(self, parts: Parts, name: str = "vae_decoder") -> None:
        config = parts.bundle.config(name)
        self.scale = 2 ** (parts.bundle.levels(name) - 1)
        self.scaling = Scaling.of(config)
        pixels = f"{name}/pixels.onnx"
        self._bakes_pixels = parts.bundle.has(pixels)
        floats = f"{name}/model.onnx"
        self._part = parts.part(pixels if self._bakes_pixels else floats)
        # Whole numbers can't tell what was no number: there the float graph is asked. Not opened until then.
        self._floats = parts.part(floats) if self._bakes_pixels and parts.bundle.has(floats) else None
        self._engine_name, self._low_memory = parts.engine, parts.low_memory

    def load(self) -> None:
        self._part.load()

    def pixels(self, latents: NDArray[np.float32], tiled: bool | None = None) -> NDArray[np.uint8]:
        """float32 latents [n, c, h, w] as the network sees them -> sRGB uint8 [n, height, width, 3].

        tiled: None decides by size; see `Tiling`.
        """
        if not np.isfinite(latents).all():
            raise NotFiniteError(f"{self._engine_name}: the last step's latents are not finite; fewer steps may help")
        if tiled is None:
            tiled = max(latents.shape[-2:]) * self.scale > TILING.whole_px(self._engine_name, self._low_memory)
        with self._part.running() as engine:
            if tiled:
                return decode_in_tiles(latents, self.scale, lambda tile: self._decode(engine, tile))
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
