"""Shapes and what a plan was built for: which plan or profile takes them; if none does, what to build. Knows no TensorRT.

An axis is told by its place, as in export/trt_profiles.py: 4-D is [batch, channels, height, width], 3-D is
[batch, tokens, width], everything else begins with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .protocol import Engine

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, ...]]  # input -> least, best, most


class Outside(NamedTuple):
    """The first axis of `name` that does not lie between `low` and `high`."""

    name: str
    axis: int
    low: int
    high: int


@dataclass(frozen=True)
class Rebuild:
    """The command that builds a part anew, but for --size, --batch and --static.

    unit_px: pixels for each step of its inputs' height and width. pictures: least, best and most that it was built for,
    where that is known. static: it was built for one shape.
    """

    command: str
    unit_px: int = 1
    pictures: tuple[int, ...] = ()
    static: bool = False

    def cure(self, profile: Profile, shapes: Mapping[str, Shape], outside: Outside) -> str:
        """The command with the options that take these shapes too, or why there are none."""
        rank = len(shapes[outside.name])
        ranged = outside.high > outside.low
        if (rank, outside.axis) == (3, 1):
            if ranged:  # an engine with a range takes as long ones as any does
                return f"prompts stop at {outside.high // outside.low} chunks of {outside.low} tokens: shorten it"
            inside = {
                name: best for name, (_, best, _) in profile.items()
            }  # a static one takes no more: see `_options`
            return f"widen it: {self.command}{self._range(profile, {**shapes, **inside})}"
        if rank == 2 and not any(len(shape) == 4 for shape in shapes.values()):  # a text encoder's prompts, in chunks
            return "prompts stop there: shorten it" if ranged else f"widen it: {self.command}"
        return f"widen it: {self.command}{self._one(profile, shapes) or self._range(profile, shapes)}"

    def _one(self, profile: Profile, shapes: Mapping[str, Shape]) -> str:
        """Of a static engine: another one beside it. '' where its pictures' evaluations don't make up this batch, or
        prompts are longer than one chunk."""
        longer = any(len(best) == 3 and shapes[name][1] != best[1] for name, (_, best, _) in profile.items())
        for name, (_, best, _) in profile.items():
            if self.static and self.pictures and not longer and len(best) == 4:
                count, left = divmod(shapes[name][0], best[0] // self.pictures[1] or 1)
                return "" if left else f" --static --size {self._side(shapes[name])} --batch {count}"
        return ""

    def _range(self, profile: Profile, shapes: Mapping[str, Shape]) -> str:
        for name, (least, best, most) in profile.items():
            if len(least) == 4:
                got = shapes[name]
                wide = [tuple(map(min, least, got)), best, tuple(map(max, most, got))]
                pictures = self._pictures(got[0], (least[0], best[0], most[0]))
                return f" --size {':'.join(map(self._side, wide))} --batch {':'.join(map(str, pictures))}"
        return ""

    def _pictures(self, batch: int, built: tuple[int, ...]) -> tuple[int, ...]:
        """--batch for an axis that was `built` so and is to take `batch` too; guidance evaluates each picture twice."""
        least, best, most = self.pictures or built
        each_least, each_most = max(built[0] // least, 1), max(built[2] // most, 1)
        if self.static:  # an engine with a range takes pictures both with guidance and without
            each_least = 1
        return min(least, max(batch // each_least, 1)), best, max(most, -(-batch // each_most))

    def _side(self, shape: Shape) -> str:
        return f"{shape[3] * self.unit_px}x{shape[2] * self.unit_px}"


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape], rebuild: Rebuild) -> int:
    """The profile that takes these shapes and is tuned for the nearest. EngineError says what lies outside, and the cure."""
    faults = [find_outside(profile, shapes) for profile in profiles]
    fitting = [i for i, fault in enumerate(faults) if fault is None]
    if not fitting and faults and (fault := faults[0]):
        shape = "x".join(map(str, shapes[fault.name]))
        raise EngineError(
            f"input {fault.name!r} is {shape}, but axis {fault.axis} was built for {fault.low} to {fault.high}; "
            f"{rebuild.cure(profiles[0], shapes, fault)}"
        )
    return min(fitting, key=lambda i: _distance(profiles[i], shapes), default=0)


def find_outside(profile: Profile, shapes: Mapping[str, Shape]) -> Outside | None:
    for name, (least, _, most) in profile.items():
        for axis, (low, size, high) in enumerate(zip(least, shapes[name], most, strict=True)):
            if not low <= size <= high:
                return Outside(name, axis, low, high)
    return None


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    """How far the shapes are from what the profile is tuned for, as a sum of ratios."""
    return sum(
        abs(float(np.log(size / wanted)))
        for name, (_, best, _) in profile.items()
        for size, wanted in zip(shapes[name], best, strict=True)
    )


class SeveralPlans:
    """Plans of one graph as one engine: each run is for the first, in their order, that was built for its shapes.

    The first is open from the start, each other from the first run that needs it; all stay open. Shapes outside of
    every plan are the first one's to refuse.
    """

    def __init__(self, profiles: Sequence[Profile], open_plan: Callable[[int], Engine]) -> None:
        self._profiles, self._open_plan = profiles, open_plan
        first = open_plan(0)
        self._open = {0: first}
        self.inputs, self.outputs = first.inputs, first.outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shapes = {name: array.shape for name, array in feeds.items()}
        fitting = (i for i, profile in enumerate(self._profiles) if find_outside(profile, shapes) is None)
        index = next(fitting, 0)
        if index not in self._open:
            self._open[index] = self._open_plan(index)
        return self._open[index].run(feeds)

    def close(self) -> None:
        for engine in self._open.values():
            engine.close()
        self._open = {}
