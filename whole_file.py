"""Files that are there whole or not at all, whatever happens while they are written, and what tells one from another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ends the names of files in the making: what is left under such a name, a killed process left


@contextlib.contextmanager
def writing(path: Path, permissions: int = 0o666, *, replace: bool = True) -> Iterator[BinaryIO]:
    """What the block writes becomes `path` at its end, in place of what was there; `permissions` less the umask's.

    Where `path` is a symbolic link, the file that it leads to is replaced, and the link stays. replace=False:
    FileExistsError where something is there by then. Any other OSError as it comes. Then, as after any other exception,
    `path` is what it was and nothing else is left.
    """
    if replace:
        path = Path(os.path.realpath(path))
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, permissions)) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(part, path)
        else:
            _take_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file's content, 64 lower-case hex digits; read piece by piece. OSError as it comes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _take_name(part: Path, path: Path) -> None:
    """Of two who want it, one gets it and the other is told."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.open("xb").close()
        os.replace(part, path)
