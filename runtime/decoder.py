"""Latents to pictures, with the graph that ends in pixels, or with a float decoder of another tool's bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle import Bundle
from ..engines import open_engine
from ..errors import EngineError

_PIXELS = "vae_decoder/pixels.onnx"


class Decoder:
    """`scale`: pixels a latent, each way."""

    def __init__(self, bundle: Bundle, engine: str) -> None:
        config = bundle.config("vae_decoder")
        channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
        self.scale = 2 ** (len(channels) - 1)
        # Configurations older than these keys mean diffusers' defaults.
        default = 1.0 if "decoder_block_out_channels" in config else 0.18215
        self._scaling_factor = float(config.get("scaling_factor", default))
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not (mean and std):  # only some fine-tuned SDXL autoencoders have them, one a channel, both or none
            mean, std = config.get("shift_factor") or 0.0, 1.0
        self._mean, self._std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        self._bakes_pixels = bundle.has(_PIXELS)
        graph = bundle.file(_PIXELS) if self._bakes_pixels else bundle.graph("vae_decoder")
        self._engine = open_engine(graph, engine)

    def pixels(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32 latents [n, c, h, w] as the network sees them -> sRGB uint8 [n, height, width, 3]."""
        dtype = self._engine.inputs["latent_sample"].dtype
        if self._bakes_pixels:
            pixels: NDArray[np.uint8] = self._engine.run({"latent_sample": latents.astype(dtype, copy=False)})["pixels"]
            return pixels
        unscaled = latents * (self._std / np.float32(self._scaling_factor)) + self._mean
        sample = self._engine.run({"latent_sample": unscaled.astype(dtype, copy=False)})["sample"].astype(np.float32)
        if not np.isfinite(sample).all():
            raise EngineError("the decoder gave values that are not finite; it may overflow in fp16: export it in fp32")
        pixels = np.rint(np.clip(sample / 2 + 0.5, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels)

    def images(self, latents: NDArray[np.float32]) -> list[Image.Image]:
        return [Image.fromarray(p) for p in self.pixels(latents)]

    def close(self) -> None:
        self._engine.close()
