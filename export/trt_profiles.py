"""Which shapes an engine is built for: from sizes in px and pictures at once to a range for every free axis.

Knows no TensorRT. An axis is told by its place, not by its name, so that other tools' exports are understood too:
4-D is [batch, channels, height, width], 3-D is [batch, tokens, width], everything else begins with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..bundle import Bundle
from ..errors import EngineError, UsageError
from ..tiling import TILING, Tiling
from .tokenizer_files import TOKENS

MOST_TOKENS = 3 * TOKENS  # three contexts of CLIP's side by side, for long prompts
MOST_PICTURES = 64  # at once: far beyond what is faster than one after the other
_PIXELS = ("vae_encoder",)  # parts whose pictures are in px; all others have latents


class Range(NamedTuple):
    """Least, best and most; the engine is tuned for the best."""

    least: int
    best: int
    most: int


_GUIDED = Range(1, 1, 2)
_TOKENS = Range(TOKENS, TOKENS, MOST_TOKENS)


@dataclass(frozen=True)
class Sizes:
    """What an engine must take: picture sides in px, pictures at once, and whether guidance doubles the UNet's batch.

    tiling: None where decoders get every picture whole.
    """

    width: Range
    height: Range
    batch: Range
    guided: Range = _GUIDED  # evaluations of the UNet for each picture
    tokens: Range = _TOKENS
    tiling: Tiling | None = None

    def static(self) -> Sizes:
        """The best of everything, and nothing else."""
        fixed = (Range(r.best, r.best, r.best) for r in (self.width, self.height, self.batch, self.guided, self.tokens))
        return Sizes(*fixed, self.tiling)

    def side(self, axis: int) -> Range:
        """Of axis 2, height, or 3, width."""
        return self.height if axis == 2 else self.width

    def decoded(self) -> Sizes:
        """What a decoder gets of these: no side above the one from which tiles are used, and tiles."""
        if self.tiling is None or max(self.width.most, self.height.most) <= self.tiling.from_px:
            return self
        tile, whole = self.tiling.side, self.tiling.always_px
        if max(self.width.least, self.height.least) > whole:  # never a whole picture
            whole = tile
        width, height = (
            Range(min(r.least, tile), r.best if r.best <= whole else tile, min(r.most, whole))
            for r in (self.width, self.height)
        )
        return replace(self, width=width, height=height)


def bundle_sizes(bundle: Bundle) -> Sizes:
    """From the bundle's defaults and limits, the recipe's as they were when it was exported, and the runtime's tiles."""
    defaults = bundle.manifest.defaults if bundle.manifest else {}
    limits = bundle.manifest.limits if bundle.manifest else {}
    native = bundle.number("unet", "sample_size") * latent_px(bundle)
    least, most = limits.get("size_px", (native, native))
    width, height = (int(defaults.get(side, native)) for side in ("width", "height"))
    guided = Range(1, 2 if float(defaults.get("guidance", 7.5)) > 1 else 1, 2)
    most_guided = limits.get("guidance", (0, 2))[1]
    if most_guided <= 1:
        guided = Range(1, 1, 1)
    return Sizes(Range(least, width, most), Range(least, height, most), Range(1, 1, 4), guided, tiling=TILING)


def latent_px(bundle: Bundle) -> int:
    """Pixels a latent, each way."""
    return int(2 ** (bundle.levels("vae_decoder") - 1))


_INPUTS = {  # of each part what it has at least, by rank; some tools export the timestep as a scalar
    "text_encoder": {"input_ids": (2,)},
    "text_encoder_2": {"input_ids": (2,)},
    "unet": {"sample": (4,), "timestep": (0, 1), "encoder_hidden_states": (3,)},
    "vae_encoder": {"sample": (4,)},
    "vae_decoder": {"latent_sample": (4,)},
    "tiny_vae_decoder": {"latent_sample": (4,)},
}


def check_inputs(graph: str, part: str, inputs: Mapping[str, Sequence[int]]) -> None:
    """Raises EngineError for a graph, 'unet/model.onnx', that no pipeline could feed as this part."""
    for name, ranks in _INPUTS.get(part, {}).items():
        if name not in inputs or len(inputs[name]) not in ranks:
            got = ", ".join(f"{each} with {len(shape)} axes" for each, shape in inputs.items())
            raise EngineError(
                f"{graph} is not the graph of a {part}: it lacks an input {name} with {ranks[-1]} axes, and has {got}; "
                "export the bundle again"
            )


def profile(
    part: str, inputs: Mapping[str, Sequence[int]], sizes: Sizes, scale: int
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """(least, best, most) shape of each input that has a free axis (-1). `scale`: px a latent."""
    found = {}
    for name, shape in inputs.items():
        if -1 in shape:
            ranges = [_range(part, len(shape), axis, size, sizes, scale) for axis, size in enumerate(shape)]
            found[name] = tuple(zip(*ranges, strict=True))
    return found


def _range(part: str, rank: int, axis: int, size: int, sizes: Sizes, scale: int) -> Range:
    if size >= 0:
        return Range(size, size, size)
    if axis == 0:
        return _batch(part, rank, sizes)
    if rank == 3:
        return sizes.tokens
    side = (sizes.decoded() if part.endswith("vae_decoder") else sizes).side(axis)
    return Range(*(px // unit_px(part, scale) for px in side))


def unit_px(part: str, scale: int) -> int:
    """Pixels for each step of an input's height and width."""
    return 1 if part in _PIXELS else scale


def _batch(part: str, rank: int, sizes: Sizes) -> Range:
    if part == "unet":
        if rank == 1:  # the timestep, which is one for all
            return Range(1, 1, 1)
        return Range(*(n * each for n, each in zip(sizes.batch, sizes.guided, strict=True)))
    if part.startswith("text_encoder"):  # the prompt and the negative one, in pieces if they are long
        return Range(1, 1, 1 if sizes.tokens.most == TOKENS else 2 * MOST_TOKENS // TOKENS)
    if part.endswith("vae_decoder"):  # tiles, and pictures with little memory, are decoded one at a time
        return sizes.batch._replace(least=1)
    return sizes.batch


def size_range(text: str) -> tuple[Range, Range]:
    """'512:1024:1024' or '512x512:1024x576:1536x1024', or one size alone, to the ranges of width and height in px."""
    sizes = [_size(piece, text) for piece in text.lower().split(":")]
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3:
        raise UsageError(
            f"a size must be MIN:BEST:MAX or one size, in px such as 512:768:1024 or 768x512, not {text!r}"
        )
    return _rising([w for w, _ in sizes], "size", text), _rising([h for _, h in sizes], "size", text)


def batch_range(text: str) -> Range:
    """'1:1:4' or '2' to a range of pictures at once."""
    pieces = text.split(":")
    if len(pieces) not in (1, 3) or not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
        raise UsageError(f"a batch must be MIN:BEST:MAX or one number, from 1 on, such as 1:1:4, not {text!r}")
    if any(len(piece) > 9 or int(piece) > MOST_PICTURES for piece in pieces):
        raise UsageError(f"a batch must be of {MOST_PICTURES} pictures at most, not {text!r}")
    return _rising([int(piece) for piece in (pieces if len(pieces) == 3 else pieces * 3)], "batch", text)


def check_sides(sizes: Sizes, least_px: int, most_px: int) -> None:
    """Raises UsageError unless a pipeline draws every one of the sizes named."""
    for px in (*sizes.width, *sizes.height):
        if not least_px <= px <= most_px:
            raise UsageError(f"a side must be {least_px} to {most_px} px for this model, not {px}")


def check_multiple(sizes: Sizes, multiple: int) -> None:
    """Raises UsageError unless the UNet can take every one of the sizes named."""
    for px in (*sizes.width, *sizes.height):
        if px < multiple or px % multiple:
            raise UsageError(f"a side must be a multiple of {multiple} px for this model, not {px}")


def _size(piece: str, text: str) -> tuple[int, int]:
    width, x, height = piece.partition("x")
    if not _is_number(width) or (x and not _is_number(height)):
        raise UsageError(f"a size must be in px, such as 512, 768x512 or 512:768:1024, not {text!r}")
    return int(width), int(height if x else width)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10  # Python itself refuses to read thousands of digits


def _rising(numbers: list[int], kind: str, text: str) -> Range:
    if sorted(numbers) != numbers:
        raise UsageError(f"a {kind}'s MIN:BEST:MAX must not fall, as in 1:1:4, but {text!r} does")
    return Range(*numbers)
