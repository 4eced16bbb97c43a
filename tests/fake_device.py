"""A GPU that is numpy: memory with addresses, a stream that runs when it is waited for, graphs of what was captured.

As CUDA documents it, new memory holds anything, page-locked memory is read and written when a copy runs and not when it is
asked for, and what pending work uses may not be freed. It fails where CUDA would: memory that was freed or never
allocated, copies past an end, a graph after its buffers.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from vega_edge.engines import Spec
from vega_edge.errors import EngineError

F32 = np.dtype(np.float32)
GARBAGE = 0xA5  # each byte of memory that nothing was written to


class FakeDevice:
    def __init__(self):
        self.allocated, self.next, self.pinned, self.graphs = {}, 0x1000, {}, {}
        self.calls = Counter()
        self.pending, self.capturing = [], None
        self.refuse_capture = False
        self.closed = False

    def activate(self):
        self.calls["activate"] += 1

    def allocate(self, size):
        assert self.capturing is None
        self.calls["allocate"] += 1
        self.next += 0x1000000
        self.allocated[self.next] = np.full(size, GARBAGE, np.uint8)
        return self.next

    def free(self, pointer):
        assert not self.pending and self.capturing is None
        del self.allocated[pointer]

    def pin(self, size):
        staging = np.full(size, GARBAGE, np.uint8)
        self.pinned[staging.ctypes.data] = staging
        return staging

    def unpin(self, staging):
        assert not self.pending
        del self.pinned[staging.ctypes.data]

    def upload(self, pointer, staging):
        assert self.capturing is None
        self.calls["upload"] += 1
        self.pending.append(lambda: np.copyto(self.allocated[pointer][: staging.nbytes], staging))

    def download(self, staging, pointer):
        assert self.capturing is None
        self.calls["download"] += 1
        self.pending.append(lambda: np.copyto(staging, self.allocated[pointer][: staging.nbytes]))

    def synchronize(self):
        assert self.capturing is None
        pending, self.pending = self.pending, []
        for work in pending:
            work()

    def capture(self, enqueue):
        if self.refuse_capture:
            raise EngineError("operation not permitted when stream is capturing")
        self.calls["capture"] += 1
        self.capturing = []
        enqueue()
        self.next += 1
        self.graphs[self.next] = self.capturing
        self.capturing = None
        return self.next

    def replay(self, graph):
        self.calls["replay"] += 1
        self.pending += self.graphs[graph]

    def destroy(self, graph):
        assert not self.pending
        del self.graphs[graph]

    def launch(self, work):
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.calls["launch"] += 1
            self.pending.append(work)

    def close(self):
        self.closed = True


class FakeProgram:
    """y = 2 x + b, x float32[batch, n], b float32[1]; scratch memory, 8 bytes a row, that its contexts write to."""

    def __init__(self, device, profiles):
        self.device, self.profiles = device, profiles
        self.inputs = {"x": Spec(F32, (None, None)), "b": Spec(F32, (1,))}
        self.outputs = {"y": Spec(F32, (None, None))}
        self.contexts, self.opened, self.closed = [], 0, False
        self.capturable = True

    def context(self, profile, shapes):
        self.opened += 1
        context = FakeContext(self, profile, dict(shapes))
        self.contexts.append(context)
        return context

    def close(self):
        assert not self.contexts
        self.closed = True


class FakeContext:
    def __init__(self, program, profile, shapes):
        self.program, self.profile, self.shapes = program, profile, shapes
        self.outputs, self.scratch_bytes = {"y": shapes["x"]}, 8 * shapes["x"][0]
        self.addresses = None

    def bind(self, addresses, scratch):
        self.addresses, self.scratch = dict(addresses), scratch

    def check_capturable(self):
        assert self.addresses
        if not self.program.capturable:
            raise EngineError("not this one")

    def enqueue(self):
        memory, at, shape = self.program.device.allocated, self.addresses, self.shapes["x"]

        def work():
            count = int(np.prod(shape))
            x = memory[at["x"]].view(F32)[:count]
            memory[self.scratch][: self.scratch_bytes] = 1
            assert memory[self.scratch].size >= self.scratch_bytes
            memory[at["y"]].view(F32)[:count] = 2 * x + memory[at["b"]].view(F32)[0]

        self.program.device.launch(work)

    def close(self):
        self.program.contexts.remove(self)
