"""A plan as an Engine: which profile, which buffers, when to capture a CUDA graph and when to replay one.

Decides only: `Program` and `Device` do the work, in tensorrt.py and cuda.py, or in a test. Each shape has a context and,
from its second run on, a CUDA graph; those used longest ago go when there are too many.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .device_io import Buffers, Device, sizes
from .plan_range import Profile, Rebuild, Shape, choose_profile
from .protocol import Spec

_SHAPES = 4  # kept ready at once: guided or not, in two sizes
_log = logging.getLogger(__name__)


class Context(Protocol):
    """A plan ready to run with one set of shapes. `scratch_bytes`: of the memory that it works in, which all contexts of
    a plan share, since only one runs at a time. `check_capturable` raises EngineError where a bound one is known not to
    go into a CUDA graph."""

    @property
    def outputs(self) -> Mapping[str, Shape]: ...
    @property
    def scratch_bytes(self) -> int: ...
    def bind(self, addresses: Mapping[str, int], scratch: int) -> None: ...
    def check_capturable(self) -> None: ...
    def enqueue(self) -> None: ...
    def close(self) -> None: ...


class Program(Protocol):
    """A loaded plan."""

    @property
    def inputs(self) -> Mapping[str, Spec]: ...
    @property
    def outputs(self) -> Mapping[str, Spec]: ...
    @property
    def profiles(self) -> Sequence[Profile]: ...
    def context(self, profile: int, shapes: Mapping[str, Shape]) -> Context: ...
    def close(self) -> None: ...


@dataclass
class _Prepared:
    context: Context
    bound: bool = False
    runs: int = 0
    graph: Any = None


class PlanEngine:
    """`rebuild`: what an error names where a shape lies outside. `graphs=False` captures nothing."""

    def __init__(self, program: Program, device: Device, rebuild: Rebuild, graphs: bool = True) -> None:
        self.inputs, self.outputs = program.inputs, program.outputs
        self._program, self._device, self._rebuild, self._graphs = program, device, rebuild, graphs
        self._buffers = Buffers(device)
        self._scratch, self._scratch_bytes = 0, 0
        self._prepared: OrderedDict[tuple[Any, ...], _Prepared] = OrderedDict()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._device.activate()
        prepared = self._ready({name: array.shape for name, array in feeds.items()})
        given = {name: (self.outputs[name].dtype, shape) for name, shape in prepared.context.outputs.items()}
        needed = {name: int(np.prod(shape)) * dtype.itemsize for name, (dtype, shape) in given.items()}
        if self._buffers.reserve({**sizes(feeds.items()), **needed}):
            self._unbind()
        self._make_scratch(prepared.context.scratch_bytes)
        self._buffers.upload(feeds)
        self._execute(prepared)
        return self._buffers.download(given)

    def close(self) -> None:
        self._device.activate()
        self._device.synchronize()
        while self._prepared:
            self._drop(self._prepared.popitem()[1])
        self._buffers.close()
        self._free_scratch()
        self._program.close()
        self._device.close()

    def _ready(self, shapes: Mapping[str, Shape]) -> _Prepared:
        key = tuple(sorted(shapes.items()))
        if key not in self._prepared:
            profile = choose_profile(self._program.profiles, shapes, self._rebuild)
            while len(self._prepared) >= _SHAPES:
                self._device.synchronize()
                self._drop(self._prepared.popitem(last=False)[1])
            self._prepared[key] = _Prepared(self._program.context(profile, shapes))
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _make_scratch(self, size: int) -> None:
        """For the largest shape met so far: memory for the largest that could come may be gigabytes more."""
        if size <= self._scratch_bytes:
            return
        self._unbind()
        self._free_scratch()  # first: both at once may not fit
        self._scratch = self._device.allocate(size)
        self._scratch_bytes = size

    def _free_scratch(self) -> None:
        scratch, self._scratch, self._scratch_bytes = self._scratch, 0, 0
        if scratch:
            self._device.synchronize()
            self._device.free(scratch)

    def _execute(self, prepared: _Prepared) -> None:
        """The first run warms up: the library compiles and allocates then, which a capture may not contain."""
        if not prepared.bound:
            prepared.context.bind(self._buffers.addresses, self._scratch)
            prepared.bound = True
        if prepared.graph is None and prepared.runs and self._graphs:
            self._capture(prepared)
        if prepared.graph is not None:
            self._device.replay(prepared.graph)
        else:
            prepared.context.enqueue()
        prepared.runs += 1

    def _capture(self, prepared: _Prepared) -> None:
        try:
            prepared.context.check_capturable()
            prepared.graph = self._device.capture(prepared.context.enqueue)
        except EngineError as failure:
            self._graphs = False
            _log.warning("this plan can't be captured as a CUDA graph, and runs without one, slower: %s", failure)

    def _unbind(self) -> None:
        """A buffer moved: graphs hold its old address."""
        for prepared in self._prepared.values():
            self._forget_graph(prepared)
            prepared.bound, prepared.runs = False, 0

    def _drop(self, prepared: _Prepared) -> None:
        self._forget_graph(prepared)
        prepared.context.close()

    def _forget_graph(self, prepared: _Prepared) -> None:
        if prepared.graph is not None:
            self._device.destroy(prepared.graph)
            prepared.graph = None
