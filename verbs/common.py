"""What several verbs share: the progress bar and kinds of arguments."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def bar(total: int | None) -> Iterator[Any]:
    """A progress bar on stderr, where that is a terminal; total None: unknown."""
    from tqdm import tqdm

    with tqdm(total=total, disable=None, leave=False, file=sys.stderr) as shown:
        yield shown


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 128x128, got {text!r}")
    return int(match[1]), int(match[2])


def lora(text: str) -> tuple[Path, float]:
    file, colon, strength = text.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):
            return Path(file), float(strength)
    return Path(text), 1.0
