"""What several verbs share: the progress bar and kinds of arguments."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bundle import Bundle

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def bar(total: int | None) -> Iterator[Any]:
    """A progress bar on stderr, where that is a terminal; total None: unknown."""
    from tqdm import tqdm

    with tqdm(total=total, disable=None, leave=False, file=sys.stderr) as shown:
        yield shown


def warn_of_random_weights(bundle: Bundle) -> None:
    seed = bundle.manifest.source.random_weights if bundle.manifest else None
    if seed is not None:
        _log.warning("%s has random weights (seed %d): its pictures mean nothing", bundle.path, seed)


def whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")


def number(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(f"must be a number, such as 7.5, got {text!r}")


def file_name(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must be a file's name, such as picture.png, got ''")
    return Path(text)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,18})x(\d{1,18})", text.strip().lower())  # the model's range is the pipeline's to say
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 128x128, got {text!r}")
    return int(match[1]), int(match[2])


def lora(text: str) -> tuple[Path, float]:
    """'style.safetensors:0.8' to the file and its strength; 1 where none is given."""
    file, colon, strength = text.rpartition(":")
    if not text or (colon and not file):
        raise argparse.ArgumentTypeError(f"must be FILE or FILE:STRENGTH, such as style.safetensors:0.8, got {text!r}")
    if not colon or re.search(r"[\\/]|\.safetensors$", strength):  # a drive's colon, or one in the file's name
        return Path(text), 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(float(strength)):
            return Path(file), float(strength)
    raise argparse.ArgumentTypeError(f"must be FILE or FILE:STRENGTH, such as style.safetensors:0.8, got {text!r}")
