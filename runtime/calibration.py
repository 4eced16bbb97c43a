"""Inputs that a bundle's UNet really gets, to measure its values by: recorded while it draws a few pictures on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..engines import Engine
from .pipeline import Pipeline

_PROMPTS = ("a red car in front of a house", "portrait of an old man with a beard, studio light", "")
_STEPS = 4  # from pure noise to nearly none; what is measured is how large values get on the way
Feeds = dict[str, NDArray[Any]]


class _Recorder:
    """The engine around which it is, keeping what that was fed."""

    def __init__(self, engine: Engine, fed: list[Feeds]) -> None:
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._engine, self._fed = engine, fed

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        self._fed.append({name: array.copy() for name, array in feeds.items()})
        return self._engine.run(feeds)

    def close(self) -> None:
        self._engine.close()


def unet_feeds(
    bundle: Path, loras: Sequence[tuple[Path, float]] = (), progress: Callable[[float], None] = lambda share: None
) -> Iterator[Feeds]:
    """The UNet's inputs at every step of a picture for each of a few prompts, the empty one among them. loras: as
    `Pipeline.open` takes them. progress: is called with the share that is done."""
    with contextlib.closing(Pipeline.open(bundle, "onnxruntime-cpu", loras=loras)) as pipe:
        fed: list[Feeds] = []
        with pipe._unet.running() as engine:
            pipe._unet._engine = _Recorder(engine, fed)
        for seed, prompt in enumerate(_PROMPTS):
            for done, _ in enumerate(pipe.stream(prompt, seed=seed, steps=_STEPS), 1):
                yield from fed
                fed.clear()
                progress((seed + done / _STEPS) / len(_PROMPTS))
