"""Keeps other libraries' warnings, logs and progress bars from the user's terminal, and their empty folders from the disk."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Python-level chatter of torch, diffusers and transformers. For the whole process, so not for threads."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def no_compiler_folder() -> Iterator[None]:
    """Send the folder that torch makes when its tracer is imported ($TMPDIR/torchinductor_USER) to one that is removed.

    It is for what torch.compile makes, and an export compiles nothing. TORCHINDUCTOR_CACHE_DIR of the user's stays.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    if os.environ.get(name):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vega-edge-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
