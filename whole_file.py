"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ends the names of files in the making: what is left under such a name, a killed process left


@contextlib.contextmanager
def writing(path: Path, permissions: int = 0o666) -> Iterator[BinaryIO]:
    """What the block writes becomes `path` at its end, in place of what was there; `permissions` less the umask's.

    OSError as it comes. Then, as after any other exception, `path` is what it was and nothing else is left.
    """
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, permissions)) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
