"""Pictures as files: PNG with its parameters in the text that other tools read, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import UsageError, VegaEdgeError

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UsageError unless a picture can be written to `path`; called before the work starts, not after."""
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{path}: unknown picture format {path.suffix!r}; use one of {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name, or pass --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {path.parent} can't be written to")


def save(image: Image.Image, path: Path, parameters: str) -> None:
    """Saves by the name's ending; PNG carries `parameters`, JPEG and WebP carry them as an EXIF user comment."""
    options: dict[str, object] = {"format": _FORMATS[path.suffix.lower()]}
    if options["format"] == "PNG":
        info = PngInfo()
        info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text("parameters", parameters)
        options["pnginfo"] = info
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + parameters.encode("utf-16-be")
        options |= {"exif": exif, "quality": 95}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, **options)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        raise VegaEdgeError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
