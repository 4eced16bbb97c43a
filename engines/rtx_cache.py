"""Kernels that TensorRT-RTX compiled for this GPU, kept on disk, so that the second start compiles none."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from ..whole_file import writing

_log = logging.getLogger(__name__)


class RuntimeCache:
    """One plan's. A cache of another driver, GPU or version is refused by the library and made anew.

    TensorRT has none to keep: nothing here does anything then.
    """

    def __init__(self, trt: Any, engine: Any, folder: Path | None, gpu: str, key: str) -> None:
        """`key`: the plan's. Plans of one graph share `folder`, and what one writes has none of another's kernels."""
        self._trt, self._engine = trt, engine
        name = f"{gpu.replace(' ', '-').replace('/', '-')}-{key[:16]}.rtxcache"
        self._file = folder / name if folder is not None else None
        self._cache: Any = None
        self._kept = b""  # the digest of what the file holds

    def config(self, strategy: Any) -> Any:
        """For a new context; None where the library has no such thing."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Compiled for its shape at once, so that a graph is never captured around a stand-in kernel.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # plan_engine.py captures
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        if not config.set_runtime_cache(self._cache):
            _log.warning("the library takes no cache of compiled kernels for this plan: the next start compiles again")
        return config

    def save(self) -> None:
        """Writes it, whole or not at all, where it changed; without it the next start only takes longer."""
        if self._cache is None or self._file is None:
            return
        serialized = self._cache.serialize()
        if serialized is None:
            _log.warning(
                "%s can't be kept (the library gives nothing to keep): the next start compiles again", self._file
            )
            return
        content = memoryview(serialized)
        digest = hashlib.sha256(content).digest()
        if digest == self._kept:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with writing(self._file) as stream:
                stream.write(content)
            self._kept = digest
        except OSError as failure:
            _log.warning("%s can't be kept (%s): the next start compiles again", self._file, failure.strerror)

    def close(self) -> None:
        self._cache = self._engine = None

    def _read(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        content = self._file.read_bytes()
        if self._cache.deserialize(content):
            self._kept = hashlib.sha256(content).digest()
        else:
            _log.info("%s is of another driver or version; it is made anew", self._file)
