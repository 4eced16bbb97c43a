"""Pictures drawn on the CPU for what happens on the way: the inputs that a bundle's UNet really gets, to measure it by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..bundle import Bundle
from ..engines import Engine
from .parts import Parts
from .patches import Patches
from .pipeline import Pipeline

_PROMPTS = ("a red car in front of a house", "portrait of an old man with a beard, studio light", "")
_STEPS = 4  # from pure noise to nearly none; what is measured is how large values get on the way


def draw_with(
    unet: Engine,
    bundle: Path,
    loras: Sequence[tuple[Path, float]] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """A picture for each of a few prompts, the empty one among them, by the bundle with `unet` for its UNet, which is closed
    then. It has the weights that the `loras`, (file, strength), make; here they are for the text encoders. progress: is
    called with the share that is done."""
    opened = Bundle.open(bundle)
    parts = Parts(opened, "onnxruntime-cpu", Patches(opened, loras), openers={"unet/model.onnx": lambda: unet})
    with contextlib.closing(Pipeline(parts)) as pipe:
        for seed, prompt in enumerate(_PROMPTS):
            for done, _ in enumerate(pipe.stream(prompt, seed=seed, steps=_STEPS), 1):
                progress((seed + done / _STEPS) / len(_PROMPTS))
