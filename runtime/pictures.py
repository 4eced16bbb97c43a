"""Pictures as files: PNG with its parameters in the text that other tools read, written whole or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import UsageError, VegaEdgeError
from ..whole_file import writing

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_EXIF, _USER_COMMENT = 0x8769, 0x9286  # tags of the EXIF standard (CIPA DC-008)
_LONGEST_COMMENT = 32_000  # UTF-16 units: a JPEG segment holds 64 KiB
_log = logging.getLogger(__name__)


def check_name(path: Path) -> None:
    """Raises UsageError unless `path` ends as a picture's name does, in a folder that is there, and is none itself."""
    if os.path.isdir(path):  # os.path answers False where Path raises
        raise UsageError(f"{path} is a folder; name a file in it, such as {path / 'picture.png'}")
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{path}: unknown picture format {path.suffix!r}; use one of {', '.join(_FORMATS)}")
    if not os.path.isdir(path.parent):
        if os.path.exists(path.parent):
            raise UsageError(f"{path}: {path.parent} is a file, not a folder; choose another name")
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UsageError unless a picture can be written to `path`; called before the work starts, not after."""
    check_name(path)
    try:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already; choose another name, or pass --overwrite")
        path.lstat()  # a name that is too long is said here only
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as failure:
        raise UsageError(f"{path} can't be used: {getattr(failure, 'strerror', None) or failure}") from failure
    # a link's file is replaced, not the link
    folder = Path(os.path.realpath(path)).parent if overwrite else path.parent
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: the folder {folder} can't be written to")


def free_name(path: Path) -> Path:
    """`path`, or with a number behind its name, such that no file is there yet."""
    candidate, n = path, 1
    while os.path.lexists(candidate):
        n += 1
        candidate = path.with_name(f"{path.stem}-{n}{path.suffix}")
    return candidate


def save(image: Image.Image, path: Path, parameters: str, overwrite: bool = False) -> None:
    """Saves by the name's ending; PNG carries `parameters`, JPEG and WebP carry them as an EXIF user comment.

    Raises VegaEdgeError if it can't be written, or if the file exists and `overwrite` is not set; nothing is left then.
    """
    try:
        with writing(path, replace=overwrite) as file:
            image.save(file, **_options(path, parameters))  # type: ignore[arg-type]
    except FileExistsError as failure:
        raise UsageError(f"{path} exists already; choose another name, or pass --overwrite") from failure
    except OSError as failure:
        raise VegaEdgeError(f"{path} could not be written: {failure.strerror or failure}") from failure


def _options(path: Path, parameters: str) -> dict[str, object]:
    kind = _FORMATS[path.suffix.lower()]
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text("parameters", parameters)
        return {"format": kind, "pnginfo": info}
    if _fitting(parameters) != parameters:
        _log.warning("%s can't hold so long a prompt; its end is left out of the file's comment", path)
    return {"format": kind, "exif": exif_comment(parameters), "quality": 95}


def exif_comment(parameters: str) -> Image.Exif:
    """For JPEG and WebP; what does not fit into a segment is left out."""
    exif = Image.Exif()
    exif[_EXIF] = {_USER_COMMENT: b"UNICODE\0" + _fitting(parameters).encode("utf-16-be")}
    return exif


def _fitting(text: str) -> str:
    """As much of the beginning of `text` as a comment can hold; a letter beyond U+FFFF takes two units."""
    return text.encode("utf-16-be")[: 2 * _LONGEST_COMMENT].decode("utf-16-be", errors="ignore")
