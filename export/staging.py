"""The folder in which a bundle is made: beside its target, one export at a time, renamed at the end.

An export that fails removes it. One that was killed can't; the next one of the same target takes it over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import BundleError, ExportError


@contextlib.contextmanager
def staging(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    What is in it at the beginning was left by an export that was killed. ExportError if another process has it.
    """
    out = out.absolute()
    folder = out.with_name(f".{out.name}.part")
    with _alone(out):
        try:
            folder.mkdir(exist_ok=True)
        except OSError as failure:
            raise _not_made(out, failure) from failure
        try:
            yield folder
            _move_into_place(folder, out, overwrite)
        except (OSError, BundleError) as failure:
            cause = failure if isinstance(failure, OSError) else failure.__cause__
            if isinstance(cause, OSError):
                raise ExportError(_why_not_written(out, cause)) from failure
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # gone already if it became `out`


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the lock of `out`: the system frees it however its holder ends, so it never goes stale."""
    import filelock

    file = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ExportError(
            f"{out} is being made by another export at this moment; wait for it, or choose another folder"
        ) from None
    except OSError as failure:
        raise _not_made(out, failure) from failure
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; another system's lock looks for the name
            file.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            if os.name == "nt":
                file.unlink()


def _not_made(out: Path, failure: OSError) -> ExportError:
    return ExportError(f"{out} can't be made ({failure.strerror}); choose a folder that you may write to")


def _why_not_written(out: Path, failure: OSError) -> str:
    # numpy's tofile says "3 requested and 0 written", without an errno
    full = failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or (failure.errno is None and shutil.disk_usage(out.parent).free < 1 << 20):
        return f"disk full while exporting to {out}; free some space: nothing was left behind"
    return f"{out} can't be written: {failure.strerror or failure}; nothing was left behind"


def _move_into_place(folder: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ExportError(f"{out} was made by another process meanwhile; choose another folder, or ask to overwrite it")
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)  # left by an export that was killed while it moved
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
