"""Arrays on a device: buffers that stay, and uploads only of what changed. Decides; a `Device` does.

Shared by every backend that keeps its own memory on a GPU. Knows no CUDA, so it is tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Device(Protocol):
    """One GPU and one stream of it. Pointers are numbers, sizes bytes. Everything but `synchronize` may return before
    it is done, in order; each raises EngineError for what the driver refuses. `activate` makes it the calling thread's."""

    def activate(self) -> None: ...
    def allocate(self, size: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def pin(self, size: int) -> Bytes: ...
    def unpin(self, staging: Bytes) -> None: ...
    def upload(self, pointer: int, staging: Bytes) -> None: ...
    def download(self, staging: Bytes, pointer: int) -> None: ...
    def synchronize(self) -> None: ...
    def capture(self, enqueue: Callable[[], None]) -> Any: ...
    def replay(self, graph: Any) -> None: ...
    def destroy(self, graph: Any) -> None: ...
    def close(self) -> None: ...


class Held:
    """Which feeds are on the device already: constant arrays, by identity, and held so that it stays theirs."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def changed(self, feeds: Mapping[str, NDArray[Any]]) -> list[str]:
        """The names to send now; they are taken to be sent."""
        names = [name for name, array in feeds.items() if self._arrays.get(name) is not array]
        for name in names:
            self._arrays.pop(name, None)
            if is_constant(feeds[name]):
                self._arrays[name] = feeds[name]
        return names

    def forget(self, name: str) -> None:
        self._arrays.pop(name, None)


class Buffers:
    """A device buffer and page-locked staging for each named tensor. They grow, never shrink, and are used again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pointers: dict[str, int] = {}
        self._staging: dict[str, Bytes] = {}
        self._held = Held()

    @property
    def addresses(self) -> Mapping[str, int]:
        return self._pointers

    def reserve(self, sizes: Mapping[str, int]) -> bool:
        """Makes room for so many bytes of each; True if any buffer moved."""
        moved = False
        for name, size in sizes.items():
            if name in self._staging and self._staging[name].size >= size:
                continue
            self._release(name)
            self._pointers[name] = self._device.allocate(max(size, 1))
            self._staging[name] = self._device.pin(max(size, 1))
            moved = True
        return moved

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> list[str]:
        """Sends what is not there yet, and says which. `reserve` must have made room."""
        sent = self._held.changed(feeds)
        try:
            for name in sent:
                array = feeds[name]
                staging = self._staging[name][: array.nbytes]
                staging.view(array.dtype).reshape(array.shape)[...] = array
                self._device.upload(self._pointers[name], staging)
        except BaseException:  # such as Ctrl-C in a notebook, which goes on with the same arrays
            for name in sent:
                self._held.forget(name)
            raise
        return sent

    def download(self, outputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
        """Arrays of their own. Waits for the device."""
        pieces = {}
        for name, (dtype, shape) in outputs.items():
            pieces[name] = self._staging[name][: int(np.prod(shape)) * dtype.itemsize]
            self._device.download(pieces[name], self._pointers[name])
        self._device.synchronize()
        return {name: pieces[name].view(dtype).reshape(shape).copy() for name, (dtype, shape) in outputs.items()}

    def close(self) -> None:
        for name in list(self._pointers):
            self._release(name)

    def _release(self, name: str) -> None:
        self._held.forget(name)
        if name in self._pointers:
            self._device.synchronize()
            self._device.free(self._pointers.pop(name))
        if name in self._staging:
            self._device.unpin(self._staging.pop(name))


def is_constant(array: NDArray[Any]) -> bool:
    """Read-only, and no view of memory that someone may still write to."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return owner is None or (isinstance(owner, (bytes, memoryview)) and memoryview(owner).readonly)


def sizes(arrays: Iterable[tuple[str, NDArray[Any]]]) -> dict[str, int]:
    return {name: array.nbytes for name, array in arrays}
