"""What backends compiled, kept on disk: one folder for each graph, engine, version and CPU. Knows no backend.

A folder holds whatever its backend puts there; it is used again only for the very same contents. All of them together
stay within `limit`: what was used longest ago is removed before something new is written, and again after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import EngineError, UsageError
from ..known_hashes import known_sha256
from ..onnx_file import read_weights
from ..whole_file import PART

log = logging.getLogger(__name__)

VARIABLE = "VEGA_EDGE_CACHE_GB"
_MOST, _SHARE = 10_000_000_000, 0.1  # bytes, and of the disk that would be free without the cache
_LEFT_AFTER_S = 3600.0  # a folder in the making, of whom this machine knows nothing, in which nothing was written since
_open: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()  # engines of this process -> their folder
_open_lock = threading.Lock()


@dataclass(frozen=True)
class Limit:
    """How much the cache may hold. reason: for people, why that much. chosen: by VEGA_EDGE_CACHE_GB."""

    bytes: int
    reason: str
    chosen: bool = False


@dataclass(frozen=True)
class Kept:
    """One folder of the cache. used: when it was used last, in seconds since 1970. making: it is not complete."""

    folder: Path
    bytes: int
    used: float
    making: bool


def limit(cache: Path) -> Limit:
    """The smaller of 10 GB and a tenth of the free disk, the cache's own bytes counted as free; or VEGA_EDGE_CACHE_GB."""
    chosen = chosen_bytes()
    if chosen is not None:
        return Limit(chosen, VARIABLE, chosen=True)
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), cache)
    try:
        free = shutil.disk_usage(there).free
    except OSError:  # `has_room` says why
        free = 0
    share = int(_SHARE * (free + sum(each.bytes for each in contents(cache))))
    return Limit(share, "a tenth of the free disk") if share < _MOST else Limit(_MOST, "the default")


def chosen_bytes() -> int | None:
    """VEGA_EDGE_CACHE_GB in bytes, 0 for no cache; None where it is not set. UsageError if it is no such number."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise UsageError(f"{VARIABLE} must be a number of gigabytes, 0 for no cache, got {text!r}")
    return int(size * 1e9)


def contents(cache: Path) -> list[Kept]:
    """Every folder in `cache`, that used longest ago first."""
    found = []
    for folder in cache.glob("*/*"):
        with contextlib.suppress(OSError):  # another process may be removing it
            files = [file.stat() for file in folder.rglob("*") if file.is_file()]
            made = folder.stat().st_mtime
            making = folder.name.endswith(PART)
            last = max([made, *(file.st_mtime for file in files)]) if making else made
            found.append(Kept(folder, sum(file.st_size for file in files), last, making))
    return sorted(found, key=lambda each: (each.used, each.folder))


def entry(cache: Path, engine: str, version: str, identity: str) -> Path:
    """The folder in `cache` for what `engine` makes of the graph that `identity` stands for; it may not exist yet."""
    facts = "\n".join((engine, version, _instructions(), identity))
    return cache / f"{engine}-{version}" / hashlib.sha256(facts.encode()).hexdigest()[:32]


def _instructions() -> str:
    """The CPU's kind and, where Linux tells, its instruction sets: what was compiled for one may not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    sets = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {sets}"


def identity_of(path: Path, weights: Mapping[str, NDArray[Any]]) -> str:
    """A text that another graph, other weights or other replaced ones do not share."""
    digest = hashlib.blake2b()
    for file in sorted({path, *(weight.file for weight in read_weights(path).values())}):
        digest.update(known_sha256(file).encode())
    for name in sorted(weights):
        digest.update(f"\n{name} {weights[name].shape}".encode())
        digest.update(weights[name].data)
    return digest.hexdigest()


def prepared_bytes(path: Path) -> int:
    """About what a backend keeps of a graph: its weights, floats at 4 bytes each, whatever it computes in."""
    weights = read_weights(path).values()
    return sum(math.prod(w.shape) * (4 if w.dtype in ("fp32", "fp16", "bf16") else 1) for w in weights)


def has_room(folder: Path, size: int, needed: int = 0) -> bool:
    """Whether `size` bytes can be kept in `folder`, one of `entry`'s; others are removed where that makes the room.

    If not, a warning. `needed`: bytes that the networks of one pipeline must have there together; the default limit
    gives way to them, and where they can't be kept that is an EngineError. Folders of engines that this process has
    open stay, unless the room is needed.
    """
    cache = folder.parent.parent
    bound, most = limit(cache), most_bytes(cache, needed)
    there = [each for each in contents(cache) if each.folder != folder]
    stay = 0 if needed else sum(each.bytes for each in there if each.folder in _in_use())
    if needed > most:
        raise EngineError(
            f"{cache} may hold {size_text(most)} ({bound.reason}), and --memory low keeps {size_text(needed)} of these "
            f"networks there; set {VARIABLE} to more, or to 0 to do without, which takes more memory"
        )
    if size + stay > most:
        fault = f"may hold {size_text(most)} ({bound.reason}), and this network takes {size_text(size)}"
        fault += f" beside {size_text(stay)} in use" if stay else ""
        hint = f"set {VARIABLE} to more"
    else:
        trim(cache, most - size, keep=folder, even_open=needed > 0)
        fault = _disk_fault(folder, size)
        hint = "set VEGA_EDGE_HOME to a folder with room"
    if fault and needed:
        raise EngineError(
            f"{cache} {fault}, and --memory low keeps {(size >> 20) + 1} MB of this network there; {hint}, or {VARIABLE}=0 "
            "to do without, which takes more memory"
        )
    if fault:
        _warn(cache, fault, hint)
    return not fault


def most_bytes(cache: Path, needed: int = 0) -> int:
    """What the cache may hold while a pipeline is open whose networks must have `needed` bytes there."""
    bound = limit(cache)
    return bound.bytes if bound.chosen else max(bound.bytes, needed)


def _disk_fault(folder: Path, size: int) -> str:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            free = shutil.disk_usage(folder.parent).free
    except OSError as failure:
        return f"can't be written ({failure.strerror})"
    return f"has only {free >> 20} MB free" if free < size else ""


_warned: set[Path] = set()


def _warn(cache: Path, fault: str, hint: str) -> None:
    """Once a process, not once a network."""
    if cache not in _warned:
        _warned.add(cache)
        log.warning(
            "%s %s: what is compiled is not kept, and compiled again next time; %s, or %s=0",
            cache,
            fault,
            hint,
            VARIABLE,
        )


def used(folder: Path) -> None:
    """Notes that `folder` was used now."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def opened(engine: Any, folder: Path | None) -> None:
    """Notes that `engine` works with what is in `folder`, until it is closed and forgotten."""
    if folder is not None:
        with _open_lock:
            _open[engine] = folder


def _in_use() -> set[Path]:
    with _open_lock:
        return set(_open.values())


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` at the block's end unless another process was faster.

    EngineError if it can't.
    """
    part = _beside(folder)
    part.mkdir(parents=True)
    try:
        yield part
        try:
            part.rename(folder)
        except OSError as failure:
            if not folder.is_dir():
                raise EngineError(
                    f"{folder} can't be made ({failure.strerror}); {VARIABLE}=0 does without"
                ) from failure
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """A name that `contents` knows for one in the making, and `_is_left` for this process's."""
    mine = secrets.token_hex(4)  # threads of one process make the same at the same time
    return folder.with_name(f"{folder.name}-{mine}.{socket.gethostname()}.{os.getpid()}{PART}")


def trim(cache: Path, most: int, keep: Path | None = None, *, even_open: bool = False) -> list[Path]:
    """Removes the folders used longest ago until the rest fits `most` bytes, and returns them; also what killed
    processes left half made.

    These stay: `keep`, those that another process is making, and those of engines that are open in this process unless
    `even_open`. One that another process has open keeps working there (POSIX), or can't be removed and stays (Windows).
    """
    there = contents(cache)
    left = [each for each in there if each.making and _is_left(each)]
    fixed = {keep} if even_open else {keep, *_in_use()}
    removed = [each for each in left if _remove(each)]
    held = sum(each.bytes for each in there) - sum(each.bytes for each in removed)
    for each in there:
        if held <= most:
            break
        if each.making or each.folder in fixed or not _remove(each):
            continue
        held -= each.bytes
        removed.append(each)
    if removed:
        log.info("compiled graphs: %d of %d removed, to stay below %s", len(removed), len(there), size_text(most))
    return [each.folder for each in removed]


def clear(cache: Path) -> tuple[list[Kept], list[Kept]]:
    """Removes everything but what is in the making; what was removed, and what stays."""
    there = contents(cache)
    removed = [each for each in there if (not each.making or _is_left(each)) and _remove(each)]
    for folder in cache.glob("*"):
        with contextlib.suppress(OSError):  # of one that is not empty
            folder.rmdir()
    return removed, [each for each in there if each not in removed]


def _remove(each: Kept) -> bool:
    """In one step for whoever opens it meanwhile: it gets everything, or nothing. False if it can't be, or was used."""
    folder = each.folder
    try:
        if not each.making and folder.stat().st_mtime != each.used:
            return False
        going = folder if each.making else folder.rename(_beside(folder))
    except OSError:  # another process has removed it, or has it open, which Windows minds
        return False
    shutil.rmtree(going, ignore_errors=True)
    return True


def _is_left(each: Kept) -> bool:
    """Whether nobody makes this any more: its process is not there, or nothing was written in it for an hour."""
    host, _, process = each.folder.name.removesuffix(PART).partition(".")[2].rpartition(".")
    if host == socket.gethostname() and process.isdecimal() and os.name == "posix":
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):  # another user's, no process's number
            pass
    return time.time() - each.used > _LEFT_AFTER_S


def size_text(size: int) -> str:
    """For people: '4.2 GB', '37 MB'."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
