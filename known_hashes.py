"""The sha256 of large files, remembered on disk: a model of gigabytes is read through once, not at every start.

A file counts as unchanged while its inode, its size and its times of modification and of change are what they were; no
program sets the latter (on Windows it is that of creation, which programs do set). One that changed within the last
seconds is not remembered, since clocks tick too slowly to tell it from what it may be next: git documents this as the
"racy git" problem. `vega-edge verify` remembers nothing and reads everything.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from .models.storage import home
from .whole_file import sha256_of, writing

LEAST_BYTES = 1 << 24  # smaller ones are read in a hundredth of a second
_SETTLED_NS = 3 * 10**9  # FAT counts in two seconds
_FORMAT = 1

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_known: dict[str, list[Any]] = {}  # path -> what `_state` gave and the hash; what can't be kept on disk is known here


def known_sha256(path: Path) -> str:
    """Of a file's content, 64 lower-case hex digits. OSError as it comes."""
    state, name = _state(path), os.fspath(path.absolute())
    if state[1] < LEAST_BYTES:
        return sha256_of(path)
    with _lock:
        if name not in _known:
            _known.update(_read())
        seen = _known.get(name)
    if seen is not None and seen[:-1] == state:
        return str(seen[-1])
    digest = sha256_of(path)
    if _state(path) == state and time.time_ns() - max(state[2:]) > _SETTLED_NS:
        with _lock:
            _known[name] = [*state, digest]
            _keep(name)
    return digest


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _file() -> Path:
    return home() / "known-hashes.json"


def _read() -> dict[str, list[Any]]:
    """Nothing where there is none, or one that is damaged: then files are read again."""
    try:
        values = json.loads(_file().read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            return {}
        return {str(name): [*map(int, entry[:4]), str(entry[4])] for name, entry in values["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as failure:
        _log.info("%s can't be read (%s): large files are read through again", _file(), failure)
        return {}


def _keep(name: str) -> None:
    """Beside what other processes kept meanwhile, without the files that are gone."""
    kept = {path: entry for path, entry in {**_read(), name: _known[name]}.items() if os.path.exists(path)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with writing(_file(), 0o600) as stream:  # whoever writes here says which files are whole
            stream.write(json.dumps({"format": _FORMAT, "files": kept}, indent=1).encode())
    except OSError as failure:
        _log.info("%s can't be written (%s): large files are read through at the next start", _file(), failure)
