"""Shallow networks of the models' real widths, and the table of exports that are made of them.

The miniatures hide what depends on size: a bias of 1,280 numbers, a kernel of millions, 20 heads of 64. These networks
have the models' own channels, text widths, heads and autoencoders (the full one or the tiny one), with one layer a level,
attention on one level, two layers of text encoder and a small vocabulary. Their weights are made up by `--random-weights`, so no file holds them.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vega_edge.engines.dtypes import PRECISIONS
from vega_edge.ldm_names import ldm_names
from vega_edge.models.architectures import architectures

from .checkpoints import END, edit, write_tokenizer

# kind -> architecture, and the level (0: 320 channels, 1: 640, 2: 1,280) that has attention; middle blocks keep theirs
KINDS = {"vega": ("segmind-vega", 2), "sdxl": ("sdxl", 1), "small": ("small-sd", 0), "tiny": ("tiny-sd", 1)}
CHANNELS = (320, 640, 1280)
SAMPLE = 8  # latent pixels a side: an export is compared with torch at that size, a full-size one at twice it
DEPTHS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")  # of the way down, and of the way up
SPELLINGS = ("kohya", "peft", "diffusers")
RANK, ALPHA = 4, 10
ORDINARY = 8  # exports in the table that tests begin with


class Case(NamedTuple):
    """One export. precision: --dtype and --weights. loras: three are fused in, one in each spelling."""

    kind: str
    precision: tuple[str, str]
    loras: bool
    tiny_vae: bool

    def __str__(self) -> str:
        options = [name for name in self._fields[2:] if getattr(self, name)]
        return "-".join([self.kind, *self.precision, *options])

    @property
    def pairs(self) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
        return set(itertools.combinations(enumerate(self), 2))


def product() -> list[Case]:
    """Return every export that the command line allows."""
    return [Case(*each) for each in itertools.product(KINDS, PRECISIONS, (True, False), (True, False))]


def ordinary() -> list[Case]:
    """Return the table that tests begin with, chosen one after the other: the kinds in turn, each with a precision that
    none before it has while there is one, and with the most new pairs.

    Eight precisions with four kinds are 32 pairs, and an export has one of them. So these have every precision, every
    pair of the other options, and of the pairs with a precision as many as there is room for.
    """
    chosen: list[Case] = []
    seen: set[Any] = set()
    while len(chosen) < ORDINARY:
        kinds = Counter(case.kind for case in chosen)
        best = max(product(), key=lambda c: (c.precision not in seen, -kinds[c.kind], len(c.pairs - seen)))
        chosen.append(best)
        seen |= {*best.pairs, best.precision}
    return chosen


def names_precision(pair: tuple[tuple[int, Any], tuple[int, Any]]) -> bool:
    return Case._fields.index("precision") in (pair[0][0], pair[1][0])


def shallow(kind: str, folder: Path) -> Path:
    """A diffusers folder without weights, for `vega-edge export FOLDER --random-weights SEED`."""
    from vega_edge.export.skeleton import skeleton_folder

    name, level = KINDS[kind]
    architecture = architectures()[name]
    shutil.copytree(skeleton_folder(architecture), folder)
    unet = architecture.config("unet")
    wide = unet["cross_attention_dim"]
    heads = unet["attention_head_dim"]
    assert wide in (768, 768 + 1280), (
        f"{name}: a text width of {wide}; the text encoders below are those of SD 1.5 and SDXL"
    )
    per_level = {} if isinstance(heads, int) else {key: [1, 1, 1] for key in DEPTHS}
    down = ["CrossAttnDownBlock2D" if i == level else "DownBlock2D" for i in range(len(CHANNELS))]
    up = [block.replace("Down", "Up") for block in reversed(down)]
    edit(
        folder / "unet" / "config.json", block_out_channels=CHANNELS, layers_per_block=1, down_block_types=down,
        up_block_types=up, sample_size=SAMPLE, **per_level,
    )  # fmt: skip
    for part in architecture.parts:
        if part.startswith("text_encoder"):
            tokenizer = folder / part.replace("text_encoder", "tokenizer")
            shutil.rmtree(tokenizer)
            size = write_tokenizer(tokenizer, "!" if part.endswith("_2") else END)
            edit(folder / part / "config.json", num_hidden_layers=2, vocab_size=size)
    edit(folder / "vae" / "config.json", layers_per_block=1)
    return folder


def is_sdxl(kind: str) -> bool:
    return "text_encoder_2" in architectures()[KINDS[kind][0]].parts


def write_tiny_vae(folder: Path) -> Path:
    """As TAESD, 64 channels wide, with one block a level."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    ones = (1, 1, 1, 1)
    vae = AutoencoderTiny(num_encoder_blocks=ones, num_decoder_blocks=ones)
    last = vae.decoder.layers[-1]  # untrained, it gives values about 0, which are black
    last.weight.data *= 10
    last.bias.data += 0.5
    vae.half().save_pretrained(folder)
    return folder


def write_loras(folder: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], sdxl: bool) -> list[Path]:
    """One file a spelling, each over a module of every kind that LoRAs change. shapes: part -> weight -> shape.

    Kohya's spelling has the original layout's names for SDXL, as its scripts write them.
    """
    folder.mkdir()
    return [_write_lora(folder / f"{spelling}.safetensors", spelling, shapes, sdxl) for spelling in SPELLINGS]


def _write_lora(path: Path, spelling: str, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], sdxl: bool) -> Path:
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {}
    for part, weights in shapes.items():
        old = ldm_names(name.rpartition(".")[0] for name in weights) if part == "unet" and sdxl else {}
        for name in _targets(weights):
            shape = weights[f"{name}.weight"]
            inner = (RANK, *shape[1:])
            down = random.normal(0, 0.5 / np.prod(inner[1:]) ** 0.5, inner).astype(np.float32)
            up = random.normal(0, 0.5 / RANK**0.5, (shape[0], RANK, *[1] * len(shape[2:]))).astype(np.float32)
            tensors |= _spelled(spelling, part, name, old.get(name, name), down, up, sdxl)
    save_file(tensors, path)
    return path


def _targets(weights: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The first module of each kind, by the last words of its name."""
    seen = set()
    for name, shape in weights.items():
        module = name.removesuffix(".weight")
        kind = ".".join(word for word in module.split(".")[-2:] if not word.isdigit())
        if module != name and len(shape) in (2, 4) and "embed" not in name and kind not in seen:
            seen.add(kind)
            yield module


def _spelled(
    spelling: str, part: str, name: str, old: str, down: NDArray[Any], up: NDArray[Any], sdxl: bool
) -> dict[str, NDArray[Any]]:
    if spelling == "kohya":
        prefix = "unet" if part == "unet" else "te2" if part.endswith("_2") else "te1" if sdxl else "te"
        key = f"lora_{prefix}_{old.replace('.', '_')}"
        return {
            f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.array(ALPHA, np.float32),
        }  # fmt: skip
    if spelling == "peft":
        return {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    middle = "lora" if part == "unet" else "lora_linear_layer"
    return {f"{part}.{name}.{middle}.down.weight": down, f"{part}.{name}.{middle}.up.weight": up}


def shapes_of(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """part -> weight's published name -> shape, of the parts that LoRAs change."""
    from vega_edge.export.checkpoint import open_configs
    from vega_edge.export.random_weights import RandomWeights

    checkpoint = open_configs(folder)
    weights = RandomWeights(0, checkpoint.configs)
    return {part: weights.shapes(part) for part in checkpoint.parts if part != "vae"}


def write_picture(path: Path, side: int) -> Path:
    from PIL import Image

    y, x = np.mgrid[0:side, 0:side] * 255 // side
    Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).save(path)
    return path
