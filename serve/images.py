"""Pictures as the bytes of a file, with their parameters inside, as `vega-edge generate` writes them."""

from __future__ import annotations

import io

from PIL import Image

from .. import __version__
from ..runtime.pictures import exif_comment
from ..runtime.request import Request

MEDIA = {"JPEG": "image/jpeg", "WEBP": "image/webp"}


def encode(image: Image.Image, request: Request, model: str, sample: int = 0, kind: str = "JPEG") -> bytes:
    """kind: a key of `MEDIA`."""
    out = io.BytesIO()
    exif = exif_comment(request.parameters(model, __version__, sample))
    image.save(out, kind, quality=95 if kind == "JPEG" else 90, exif=exif)
    return out.getvalue()


def encode_preview(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
