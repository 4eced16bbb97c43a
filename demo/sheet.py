"""`make demo`: nine prompts by the embedded few-step model on one contact sheet, with the time of each stage."""

from __future__ import annotations

import sys
import time

from PIL import Image

from ..errors import VegaEdgeError

PROMPTS = (
    "a big red star on a blue background", "a yellow moon in the night sky", "a big red house in a meadow",
    "a purple heart at sunset", "a green tree in the desert", "a small pink circle above a big blue square on a white background",
    "a big orange triangle by the sea", "a yellow star left of a red heart on a black background", "a blue diamond on stripes",
)  # fmt: skip


def sheet(images: list[Image.Image], columns: int = 3, gap: int = 8) -> Image.Image:
    """The pictures, all of one size in px, row by row on a light ground, `gap` px between them and around."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (250, 250, 250))
    for i, image in enumerate(images):
        out.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return out


def main(path: str) -> None:
    try:
        draw(path)
    except (VegaEdgeError, OSError) as error:
        sys.exit(f"vega-edge: {error}")


def draw(path: str) -> None:
    start = time.perf_counter()
    from ..runtime.pipeline import Pipeline

    pipe = Pipeline.open("demo-vegart")
    opened = time.perf_counter()
    stages: dict[str, float] = {"import and open": opened - start}
    images = []
    for prompt in PROMPTS:
        result = pipe(prompt, seed=7)
        images.append(result.images[0])
        for stage, seconds in result.timings.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    sheet(images).save(path)
    steps = result.request.steps
    print(f"{len(images)} pictures, {pipe.name}, {steps} steps each, on {pipe.engine}:")
    for stage, seconds in stages.items():
        print(f"  {stage:<16}{seconds * 1000:8.0f} ms")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["demo.png"])
