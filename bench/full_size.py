"""The full-size models against diffusers, in fp32, on random weights: each part's error, and the latents of two steps.

    python -m vega_edge.bench.full_size -o bench/results/full-size.json            # all of them
    python -m vega_edge.bench.full_size tiny-sd small-sd -o bench/results/full-size.json

Random weights draw near-flat pictures, where a ratio of signal to noise proves nothing; so latents are compared, and
their difference is held against their own standard deviation. Weights are half precision in storage, the same numbers on
both sides, and arithmetic is fp32. diffusers goes first, one layer widened at a time, and is gone before the export
begins. Rows that are in the file already, and are not asked for, stay. Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export import export_bundle, model_source
from ..runtime.pipeline import Pipeline
from .machine import facts, markdown

MODELS = ("tiny-sd", "small-sd", "segmind-vega", "segmind-vegart", "sdxl-lightning")
PROMPT, SEED, STEPS, SIDE_PX = "a portrait of an old fisherman in a yellow raincoat", 7, 2, 256
GOAL_PART, GOAL_LATENTS = 1e-3, 0.01  # largest relative error; share of the latents' standard deviation


def reference_latents(name: str) -> NDArray[np.float32]:
    """diffusers' own pipeline: float32 [1, 4, 32, 32] after two steps without guidance."""
    import diffusers
    import torch

    from ..export.checkpoint import load_module
    from ..export.packed import Packed
    from ..export.tokenizer_files import load_tokenizer

    checkpoint = model_source(name, random_weights=SEED).open()
    packed = {part: Packed(part, load_module(checkpoint, part, {}), "fp16") for part in checkpoint.parts}
    parts: dict[str, Any] = {part: own.module for part, own in packed.items()}
    for part in [part for part in parts if part.startswith("text_encoder")]:
        tokenizer = part.replace("text_encoder", "tokenizer")
        parts[tokenizer] = load_tokenizer(checkpoint.path / tokenizer)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(dict(checkpoint.scheduler))
    if checkpoint.sdxl:
        pipe: Any = diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    else:
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **extra)
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        for own in packed.values():
            stack.enter_context(own.computing())
        latents = pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=0.0, height=SIDE_PX, width=SIDE_PX,
            generator=torch.Generator().manual_seed(SEED), output_type="latent",
        ).images  # fmt: skip
    return np.array(latents.numpy(), np.float32)


def compare(name: str, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    wanted = reference_latents(name)
    gc.collect()
    bundle = folder / name
    report = export_bundle(model_source(name, random_weights=SEED), bundle, weights="fp16", name=name)
    pipe = Pipeline.open(bundle, "onnxruntime-cpu")
    options = {"scheduler": "Euler", "family": "diffusers", "steps": STEPS, "guidance": 0.0, "seed": SEED}
    got = pipe(PROMPT, width=SIDE_PX, height=SIDE_PX, **options).latents
    pipe.close()
    return {
        "model": name,
        "parts": {part.name: part.max_relative_error for part in report.parts},
        "latents_std": float(wanted.std()),
        "latents_error_of_std": float(np.abs(got - wanted).max() / wanted.std()),
        "seconds": round(time.monotonic() - start),
    }


def missed(row: dict[str, Any]) -> list[str]:
    found = [f"{row['model']}, {p}: {e:.1e}, goal {GOAL_PART:g}" for p, e in row["parts"].items() if e > GOAL_PART]
    if row["latents_error_of_std"] > GOAL_LATENTS:
        found.append(f"{row['model']}: latents differ by {row['latents_error_of_std']:.1e} of their std, goal 0.01")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results/full-size.json"))
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.output.is_file():
        rows = {row["model"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = compare(name, Path(folder)) | {"measured": facts()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n")
    shown = [rows[name] for name in arguments.models]
    cells = [
        (r["model"], *(f"{e:.1e}" for e in (max(r["parts"].values()), r["latents_error_of_std"])), f"{r['seconds']} s")
        for r in shown
    ]
    print(markdown(("model", "largest error of a part", "latents, of their std", "time"), cells))
    if shortfalls := [line for row in shown for line in missed(row)]:
        sys.exit("\n".join(shortfalls))


if __name__ == "__main__":
    main()
