"""What an engine is: one graph open on one device; numpy in, numpy out, by name. Knows no diffusion and no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Spec(NamedTuple):
    """What an input takes or an output gives. A dimension is a size, or if it is free its name, or None if unnamed."""

    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


class LazyWeights(Mapping[str, NDArray[Any]]):
    """Initializer -> its new values, made when one of them is first asked for: a backend that opens what it compiled of
    them before never asks. There is at least one.

    `loras`: (sha256 of its file, strength) of each LoRA that they come of, in the order in which it is added: by these a
    backend tells what was compiled of them. () where that is not known.
    """

    def __init__(
        self, make: Callable[[], Mapping[str, NDArray[Any]]], loras: tuple[tuple[str, float], ...] = ()
    ) -> None:
        self._make, self.loras = make, loras
        self._made: Mapping[str, NDArray[Any]] | None = None

    def _values(self) -> Mapping[str, NDArray[Any]]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Opening:
    """How a backend opens a graph. `threads`: of the CPU, 0 leaves the number to it. `cache`: the folder that belongs
    to this graph with these weights on this backend alone, for what was compiled; may not exist yet; None for no cache.

    `cache_needs`: with `low_memory`, what the networks of the same pipeline take in the cache together, in bytes.

    `weights`: instead of the graph's initializers of these names; of their shape and of the dtype they are stored in
    (uint16 holds the bits of a bfloat16). Held by reference; may be `LazyWeights`. `low_memory`: slower, with fewer
    copies of the weights.
    `gpu`: which of the GPUs, in CUDA's order, for backends that use one.
    """

    threads: int = 0
    cache: Path | None = None
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    low_memory: bool = False
    gpu: int = 0
    cache_needs: int = 0


class Engine(Protocol):
    """An open graph. A backend's is called by one thread at a time; `open_engine` gives one that any thread may use.
    `contextlib.closing` closes it at the end of a block.

    `run` takes every input by name and gives every output by name. Arrays that it returns belong to the caller: a later
    run does not change them. Arrays that it is given are read before it returns, and not kept, with one exception: a
    read-only array (`writeable=False`) may be held by reference and its copy on the device used again when the same
    array comes again, so an array that was made read-only must not change any more.
    `close` frees the device's memory; a second close does nothing.
    """

    @property
    def inputs(self) -> Mapping[str, Spec]: ...

    @property
    def outputs(self) -> Mapping[str, Spec]: ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises EngineError for feeds that do not fit `inputs`, for a failure of the backend, and after `close`."""

    def close(self) -> None: ...


def describe(dtype: np.dtype[Any], shape: tuple[int | str | None, ...]) -> str:
    """'float32[batch, 4, ?, ?]'"""
    # str, not dtype.name, which hides a foreign byte order
    return f"{dtype}[{', '.join('?' if size is None else str(size) for size in shape)}]"
