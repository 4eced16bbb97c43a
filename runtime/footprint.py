"""An estimate of the memory that an image takes, made from a bundle's configuration before anything runs.

All sizes are in bytes. The constants are measured by `python -m benchmarks.image_memory`; they hold for a first and for
every later image. Knows no free memory and refuses nothing: see `memory.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..bundle import Bundle
from ..engines import takes_attention_form, tiles_attention
from ..errors import BundleError
from ..manifest import attention_form
from ..tiling import TILING
from .memory import weight_bytes
from .tokenizer import TOKENS

_log = logging.getLogger(__name__)
_GUIDED = 2  # samples of the network for one of an image: with the prompt, and with the negative one


class Costs(NamedTuple):
    """Measured costs of an engine.

    process: Python with the engine's library. opened: memory of an open network over its weights' files, by their storage;
    late: what its first run adds to that for good, likewise.
    unet, decoder: values that are alive at the peak, over those counted by `_unet_floats` and `_decoder_floats`;
    decoder_large: the second one above `_LARGE_PX` pixels, where onnxruntime's allocator leaves holes.
    width: bytes of a value. scores: copies of a score matrix that an attention without tiles holds; 0 if the engine works
    in tiles whatever the graph. keeps: an open network keeps the memory that its largest run took.
    """

    process: float
    opened: Mapping[str, float]
    late: Mapping[str, float]
    unet: float
    decoder: float
    decoder_large: float
    width: int
    scores: float
    keeps: bool


_LARGE_PX = 512 * 512  # between this and 768x768 nothing was measured
# Of every engine that works in the CPU's memory. Fitted to the images of 512 px in benchmarks/results/real-size.json,
# which have weights in fp16, bf16 and int8; those up to 1024 px in image-memory.json, measured later, are within 8 %,
# with little memory 21 %. The factors of fp32 are fitted to one SDXL there; OpenVINO's in fp32, and onnxruntime's of bf16,
# are estimates.
COSTS: Mapping[str, Costs] = {
    "onnxruntime-cpu": Costs(
        0.12e9, {"fp32": 1.5, "fp16": 2.35, "bf16": 3.0, "int8": 1.2}, dict.fromkeys(("fp32", "fp16", "bf16", "int8"), 0.0),
        unet=1.4, decoder=1.4, decoder_large=2.0, width=4, scores=2.0, keeps=False,
    ),
    "openvino": Costs(
        0.3e9, {"fp32": 1.3, "fp16": 2.6, "bf16": 0.95, "int8": 1.15}, {"fp32": 0.7, "fp16": 1.2, "bf16": 0.7, "int8": 1.15},
        unet=2.2, decoder=1.54, decoder_large=1.54, width=4, scores=0.0, keeps=True,
    ),
    "openvino-bf16": Costs(
        0.3e9, {"fp32": 1.4, "fp16": 2.35, "bf16": 0.95, "int8": 1.15}, {"fp32": 0.8, "fp16": 1.05, "bf16": 0.92, "int8": 1.05},
        unet=2.2, decoder=1.54, decoder_large=1.54, width=2, scores=0.0, keeps=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One call of a pipeline. width, height: px. samples: images in the batch. image: starts from a picture."""

    width: int
    height: int
    samples: int = 1
    guided: bool = True
    image: bool = False


@dataclass(frozen=True)
class Footprint:
    """A bundle's estimate on one engine. low: each network is open only while it runs. tiles: attention works in tiles."""

    engine: str
    weights: Mapping[str, int]  # part -> bytes of its files
    costs: Costs
    opened_over: Mapping[str, float]  # part -> memory of the open network over its files
    late_over: Mapping[str, float]  # part -> what its first run adds, likewise
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    tiny: bool
    low: bool
    tiles: bool
    encoder: int = 0  # of the autoencoder's encoder once it is open, which only a drawing from a picture opens

    @classmethod
    def of(cls, bundle: Bundle, engine: str, low: bool = False, vae: str = "full") -> Footprint | None:
        """Return None for an engine that is not in `COSTS`, and for a bundle whose configuration lacks a number."""
        costs = COSTS.get(engine)
        if costs is None:
            return None
        decoder = "tiny_vae_decoder" if vae == "tiny" and "tiny_vae_decoder" in bundle.parts else "vae_decoder"
        skipped = {"vae_decoder", "tiny_vae_decoder"} - {decoder}
        sizes = {part: size for part, size in weight_bytes(bundle.path).items() if part not in skipped}
        stored = bundle.manifest.weights if bundle.manifest else "fp32"
        parts = bundle.manifest.parts if bundle.manifest else {}
        storage = {part: (parts[part].weights if part in parts else None) or stored for part in sizes}
        over, late = ({p: table[kind] for p, kind in storage.items()} for table in (costs.opened, costs.late))
        files = bundle.path.glob("vae_encoder/*.onnx*")
        encoder = int(sum(file.stat().st_size for file in files) * (costs.opened[stored] + costs.late[stored]))
        try:
            config = bundle.config(decoder)
            tiny = "decoder_block_out_channels" in config
            fused = takes_attention_form(engine) and bundle.has(attention_form("unet/model.onnx"))
            tiles = not costs.scores or (fused and tiles_attention(engine))
            made = cls(engine, sizes, costs, over, late, bundle.config("unet"), config, tiny, low, tiles, encoder)
            made.total(Drawing(512, 512))  # a configuration without a number that is needed shows here
        except (BundleError, KeyError, TypeError, ValueError, IndexError) as failure:
            _log.info("no estimate of memory for %s: its configuration can't be read (%r)", bundle.path, failure)
            return None
        return made

    @property
    def opened(self) -> int:
        """What the open networks take before their first run, without the process itself."""
        return 0 if self.low else sum(map(self._open, self.weights))

    def running(self, drawing: Drawing) -> int:
        """The most that a first drawing takes beyond `opened`."""
        needs = {"unet": self._unet_bytes(drawing), "vae_decoder": self._decoder_bytes(drawing)}
        if self.low:
            needs["vae_decoder"] += max(self._open(p) + self._late(p) for p in self.weights if "vae" in p)
            needs["unet"] += self._open("unet") + self._late("unet")
            needs |= {part: self._open(part) + self._late(part) for part in self.weights if part.startswith("text")}
        if drawing.image:  # as large a first level as the decoder's last one
            pixels = drawing.width * drawing.height * self.costs.width
            needs["vae_encoder"] = (
                self.costs.decoder_large * pixels * 3 * _channels(self.vae)[0] + self.low * self.encoder
            )
        stays = 0 if self.low else self.encoder * drawing.image + sum(map(self._late, self.weights))
        return stays + int(sum(needs.values()) if self.costs.keeps and not self.low else max(needs.values()))

    def total(self, drawing: Drawing) -> int:
        """The process's largest resident memory while it draws."""
        return int(self.costs.process) + self.opened + self.running(drawing)

    def _open(self, part: str) -> int:
        return int(self.weights[part] * self.opened_over[part])

    def _late(self, part: str) -> int:
        return int(self.weights[part] * self.late_over[part])

    def _unet_bytes(self, drawing: Drawing) -> float:
        scale = 2 ** (len(_channels(self.vae)) - 1)
        pixels = math.ceil(drawing.width / scale) * math.ceil(drawing.height / scale)
        batch = drawing.samples * (_GUIDED if drawing.guided else 1)
        values = self.costs.unet * batch * pixels * _unet_floats(self.unet)
        if not self.tiles:
            values += self.costs.scores * batch * scores(self.unet, pixels, TOKENS)
        return float(values * self.costs.width)

    def _decoder_bytes(self, drawing: Drawing) -> float:
        tiled = TILING.tile(self.engine, self.low, drawing.height, drawing.width)
        height, width = map(min, tiled or (drawing.height, drawing.width), (drawing.height, drawing.width))
        alive = self.costs.decoder_large if width * height > _LARGE_PX else self.costs.decoder
        values = alive * width * height * _decoder_floats(self.vae, self.tiny)
        if not self.tiles and not self.tiny:
            scale = 2 ** (len(_channels(self.vae)) - 1)
            values += self.costs.scores * (width * height / scale**2) ** 2
        images = drawing.samples * drawing.width * drawing.height * 3 * (5 if tiled else 1)
        return values * self.costs.width + images


def _channels(config: Mapping[str, Any]) -> Sequence[int]:
    return list(config.get("block_out_channels") or config["decoder_block_out_channels"])


def _with_defaults(unet: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with diffusers' values for what it leaves out (UNet2DConditionModel, diffusers 0.42)."""
    attention = ("CrossAttnDownBlock2D",) * 3
    defaults = {
        "block_out_channels": (320, 640, 1280, 1280), "down_block_types": (*attention, "DownBlock2D"), "layers_per_block": 2,
        "attention_head_dim": 8,
    }  # fmt: skip
    return {**defaults, **{key: value for key, value in unet.items() if value is not None}}


def _unet_floats(config: Mapping[str, Any]) -> float:
    """Values alive at a U-Net's peak, a latent pixel: what the way down keeps for the way up, and the largest layer.

    A transformer's feed-forward layer has 8 times its channels, their two halves and their product; a resnet on the way
    up has three tensors of two levels' channels.
    """
    config = _with_defaults(config)
    channels, layers = _channels(config), config["layers_per_block"]
    kept = float(channels[0])
    largest = 0.0
    for level, (width, kind) in enumerate(zip(channels, config["down_block_types"], strict=True)):
        count = layers[level] if isinstance(layers, list) else layers
        below = channels[min(level + 1, len(channels) - 1)]
        kept += count * width / 4**level + (width / 4 ** (level + 1) if level + 1 < len(channels) else 0)
        live = max(3 * (width + below), 22 * width if "Attn" in kind else 0)
        largest = max(largest, live / 4**level)
    return kept + largest


def scores(config: Mapping[str, Any], pixels: int, tokens: int) -> float:
    """Numbers in the largest score matrix of one sample."""
    config = _with_defaults(config)
    heads = config.get("num_attention_heads") or config["attention_head_dim"]  # diffusers' name for the number of heads
    largest = 0.0
    for level, kind in enumerate(config["down_block_types"]):
        if "Attn" in kind:
            count, area = heads[level] if isinstance(heads, list) else heads, pixels / 4**level
            largest = max(largest, count * area * max(area, tokens))
    return largest


def _decoder_floats(config: Mapping[str, Any], tiny: bool) -> float:
    """Values alive at a decoder's peak, a pixel: three tensors as wide as what arrives at the last level."""
    channels = _channels(config)
    return 3.0 * (channels[-1] if tiny else channels[min(1, len(channels) - 1)])
