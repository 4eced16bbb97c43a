"""The picture that img2img starts from: read from any mode and orientation, fitted to a size, made into latents.

The autoencoder's encoder gives moments, a mean and a log variance for each latent (Kingma & Welling 2013,
arXiv:1312.6114); which latents are meant is drawn from them with the request's own noise, before any other, as
diffusers' img2img pipelines do.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import BundleError, UsageError
from .decoder import Scaling
from .parts import Parts

if TYPE_CHECKING:
    from .rng import NoiseSource

MAX_PIXELS = 64 << 20  # 8192 x 8192: 192 MB once it is read
# What is read. Others of Pillow's formats start other programs (EPS), or fail on damaged files in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_LOG_VARIANCES = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to these
_NEAR_AREA = math.log(4 / 3) + 1e-9
_GRAPH = "vae_encoder/model.onnx"


def read_picture(path: Path) -> Image.Image:
    """A picture file, upright, RGB. UsageError if it is none, is damaged, or has more than MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            Image.init()  # which of the formats this Pillow knows is clear after it
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                return as_rgb(image, str(path))
    except FileNotFoundError as failure:
        raise UsageError(f"there is no picture {path}") from failure
    except Image.DecompressionBombError as failure:
        raise UsageError(f"{path} has far more than {MAX_PIXELS >> 20} million pixels; make it smaller") from failure
    except UnidentifiedImageError as failure:
        raise UsageError(f"{path} is no picture that is read; allowed: {', '.join(FORMATS)}") from failure
    except (
        OSError,
        RuntimeError,
        SyntaxError,
        ValueError,
        AttributeError,
    ) as failure:  # how Pillow's readers fail on damaged files
        raise UsageError(f"{path} can't be read: {getattr(failure, 'strerror', None) or failure}") from failure


def as_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Turned as its EXIF orientation says, RGB. Transparency goes over white: what is under it is often black, and
    white is what most viewers and pages show. 16-bit grey keeps its range. UsageError for more than MAX_PIXELS, or none.
    """
    width, height = image.size
    if not width * height:
        raise UsageError(f"{name} is {width}x{height}: it has no pixels")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name} is {width}x{height}, {width * height / (1 << 20):.0f} million pixels; at most {MAX_PIXELS >> 20} "
            "million are read: make it smaller"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS:
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(np.clip(grey, 0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        raise UsageError(f"{name} is of floating point numbers, whose range is not known; save it as 8 or 16 bits")
    if image.mode == "La":  # its colours are multiplied by its transparency; Pillow makes nothing else of it
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fitted(image: Image.Image, width: int, height: int) -> NDArray[np.float32]:
    """float32 [1, 3, height, width] in [-1, 1]: the middle of the picture that has this shape, resampled by Lanczos."""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels: NDArray[np.float32] = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    return pixels


def size_for(image: Image.Image, default: tuple[int, int], least: int, most: int, multiple: int) -> tuple[int, int]:
    """Return (width, height) for a picture whose size was not asked for, in px.

    The picture's own size if the model can do it. Else the allowed size that is nearest to the picture's shape, among
    those of about as many pixels as the `default` has: three quarters to four thirds of it.
    """
    if all(least <= side <= most and side % multiple == 0 for side in image.size):
        return image.size
    shape = image.size[0] / image.size[1]
    side = math.sqrt(default[0] * default[1])
    pixels = math.prod(min(max(side * factor, least), most) for factor in (math.sqrt(shape), 1 / math.sqrt(shape)))
    sides = range(-(-least // multiple) * multiple, most + 1, multiple)

    def distance(size: tuple[int, int]) -> tuple[float, float, float]:
        """The pixels beyond what is near, then the shape, then the pixels: each as a logarithm."""
        area = abs(math.log(size[0] * size[1] / pixels))
        return max(area - _NEAR_AREA, 0.0), abs(math.log(size[0] / size[1] / shape)), area

    return min(itertools.product(sides, sides), key=distance)


@dataclass(frozen=True)
class Moments:
    """Of one picture's latents: mean and standard deviation, float32 [c, h, w], at the autoencoder's scale."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    scaling: Scaling

    def draw(self, source: NoiseSource) -> NDArray[np.float32]:
        """Latents as the network sees them, one a stream of the source: [n, c, h, w]."""
        return self.scaling.to_network(self.mean + self.std * source(self.mean.shape))


class ImageEncoder:
    """A bundle's `vae_encoder`; BundleError where it has none."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._part = parts.part(_GRAPH) if parts.bundle.has(_GRAPH) else None
        configured = parts.bundle.has("vae_encoder/config.json")
        self._scaling = Scaling.read(parts.bundle, "vae_encoder" if configured else "vae_decoder")

    def encode(self, image: Image.Image, width: int, height: int) -> Moments:
        self.check()
        assert self._part is not None
        with self._part.running() as engine:
            (name, spec), *_ = engine.inputs.items()
            outputs = engine.run({name: fitted(image, width, height).astype(spec.dtype)})
        moments = next(iter(outputs.values())).astype(np.float32)[0]
        if not np.isfinite(moments).all():
            raise BundleError(
                f"bundle {self._parts.bundle.path}: vae_encoder gave values that are not finite; export it in fp32"
            )
        mean, log_variance = np.split(moments, 2)
        return Moments(mean, np.exp(np.clip(log_variance, *_LOG_VARIANCES) / 2), self._scaling)

    def check(self) -> None:
        if self._part is None:
            raise BundleError(
                f"bundle {self._parts.bundle.path} can't start from a picture: it has no vae_encoder; export it again"
            )
