"""Refuse a bundle or a drawing that would not fit the memory that is free, and name what would."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..bundle import Bundle
from ..engines import can_run
from ..errors import NotEnoughMemoryError
from .footprint import COSTS, Drawing, Footprint
from .memory import free_bytes, weight_bytes

TOLERANCE = 0.25  # how far the estimate may be from what is measured, as a share of it
_BF16 = "openvino-bf16"
_log = logging.getLogger(__name__)


def check_weights(bundle: Bundle, engine: str, low: bool) -> None:
    """Compare a bundle with the memory that is free, before any of it is opened. low: one network is open at a time.

    Raise NotEnoughMemoryError if the files of its networks are larger than what is free and could be swapped; warn if
    the open networks probably are. Does nothing if the system does not report its free memory, or for a GPU.
    """
    free, costs = free_bytes(), COSTS.get(engine)
    if free is None or costs is None:
        return
    sizes = weight_bytes(bundle.path)
    needed = max(sizes.values(), default=0) if low else sum(sizes.values())
    weights = str(bundle.manifest.weights) if bundle.manifest else "fp32"
    likely = int(needed * (costs.opened[weights] + costs.late[weights]))
    cure = "close other programs, or use a smaller model" if low else "--memory low opens one network at a time"
    if needed > free:
        where = " in one network" if low else ""
        raise NotEnoughMemoryError(
            f"bundle {bundle.path} has {_size(needed)} of weights{where}, {_size(free)} of memory are free; {cure}"
        )
    if likely > free:
        _log.warning("opening this bundle takes about %s, %s of memory are free; %s", _size(likely), _size(free), cure)


@dataclass
class MemoryCheck:
    """An open pipeline's check. least_px, multiple_px: of the sizes that its model draws.

    An engine that keeps what its largest image took needs nothing for the next one of that size.
    """

    bundle: Bundle
    engine: str
    low: bool
    vae: str
    least_px: int
    multiple_px: int
    _held: int = 0

    def __call__(self, drawing: Drawing) -> None:
        """Raise NotEnoughMemoryError if the estimate, less its tolerance, is more than is free; warn if it is more.

        Does nothing if the system does not report its free memory, or if there is no estimate, as for a GPU.
        """
        free = free_bytes()
        here = self._footprint
        if free is None or here is None:
            return
        running = here.running(drawing)
        if running - self._held > free:
            self._refuse(here, drawing, running - self._held, free)
        if here.costs.keeps and not self.low:
            self._held = max(self._held, running)

    def _refuse(self, here: Footprint, drawing: Drawing, needed: int, free: int) -> None:
        size = f"{drawing.width}x{drawing.height}" + (f" with {drawing.samples} samples" if drawing.samples > 1 else "")
        fault = f"drawing {size} on {self.engine} takes about {_size(needed)} more memory, {_size(free)} are free"
        fitting = next(self._fitting(here, drawing, free + self._held), "")
        cure = f"this fits: {fitting}" if fitting else "close other programs, or use a smaller model"
        if needed / (1 + TOLERANCE) > free:
            raise NotEnoughMemoryError(f"{fault}; {cure}")
        _log.warning("%s; %s", fault, cure)

    @cached_property
    def _footprint(self) -> Footprint | None:
        return Footprint.of(self.bundle, self.engine, self.low, self.vae)

    def _fitting(self, here: Footprint, drawing: Drawing, free: int) -> Iterator[str]:
        """Ways that fit by the estimate, those that change the image least first."""
        reopened = free + here.opened  # what this pipeline holds is given back when another is opened

        def fits(drawing: Drawing, engine: str = self.engine, low: bool = self.low, vae: str = self.vae) -> bool:
            other = Footprint.of(self.bundle, engine, low, vae)
            return other is not None and other.opened + other.running(drawing) <= reopened

        if drawing.samples > 1 and here.running(replace(drawing, samples=1)) <= free:
            yield "--samples 1"
        if not self.low and fits(drawing, low=True):
            yield "--memory low"
        if self.engine != _BF16 and can_run(_BF16, self.bundle.precision) and fits(drawing, engine=_BF16):
            yield f"--engine {_BF16}"
        if self.vae != "tiny" and "tiny_vae_decoder" in self.bundle.parts:
            if fits(drawing, vae="tiny"):
                yield "--vae tiny"
            if fits(drawing, vae="tiny", low=True):
                yield "--vae tiny --memory low"
        for smaller in self._smaller(drawing):
            if here.running(smaller) <= free:
                yield f"--size {smaller.width}x{smaller.height}"
        if not self.low:
            for smaller in self._smaller(drawing):
                if fits(smaller, low=True):
                    yield f"--memory low --size {smaller.width}x{smaller.height}"

    def _smaller(self, drawing: Drawing) -> Iterator[Drawing]:
        """The same shape, a step smaller each time, one sample."""
        longest = max(drawing.width, drawing.height)
        for side in range(longest - self.multiple_px, 0, -self.multiple_px):
            sides = [
                round(length * side / longest / self.multiple_px) * self.multiple_px
                for length in (drawing.width, drawing.height)
            ]
            if min(sides) < self.least_px:
                return
            yield replace(drawing, width=sides[0], height=sides[1], samples=1)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
