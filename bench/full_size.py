"""The full-size models against diffusers, in fp32, on random weights: each part's error, and the latents of two steps.

    python -m vega_edge.bench.full_size -o benchmarks/results/full-size.json            # all of them
    python -m vega_edge.bench.full_size tiny-sd small-sd -o benchmarks/results/full-size.json

Random weights draw near-flat pictures, where a ratio of signal to noise proves nothing; so latents are compared, and
their difference is held against their own standard deviation. The recipe's own scheduler and guidance are used; where it
has a LoRA, one of random numbers over the same modules is fused, on one side by diffusers and peft. Each side is a
process of its own: diffusers goes first and leaves its latents in a file. The bundle is fp32 on disk too (10.3 GB for
SDXL's U-Net); the memory that each side took is in its row. Rows that are in the file already, and are not asked for,
stay. Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export import export_bundle, model_source
from ..models import Recipe, recipes
from ..runtime.pipeline import Pipeline
from ..runtime.schedulers import get_scheduler
from .lora import write_random_lora
from .machine import facts, markdown, peak_mb

MODELS = ("tiny-sd", "small-sd", "segmind-vega", "segmind-vegart", "sdxl-lightning")
PROMPT, SEED, STEPS, SIDE_PX = "a portrait of an old fisherman in a yellow raincoat", 7, 2, 256
GOAL_PART, GOAL_LATENTS = 1e-3, 0.01  # largest relative error; share of the latents' standard deviation
LATENTS, LORA, LORA_RANK = "latents.npy", "lora.safetensors", 128


def reference(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """diffusers' own pipeline: writes float32 [1, 4, 32, 32], and the LoRA where the recipe has one."""
    checkpoint = model_source(recipe.name, random_weights=SEED).open()
    if recipe.loras:
        write_random_lora(checkpoint.weight_shapes("unet"), folder / LORA, LORA_RANK)
    np.save(folder / LATENTS, reference_latents(recipe, checkpoint, folder / LORA if recipe.loras else None))
    return {"reference_peak_gb": round(peak_mb() / 1024, 1)}


def reference_latents(recipe: Recipe, checkpoint: Any, lora: Path | None) -> NDArray[np.float32]:
    import diffusers
    import torch

    from ..export.checkpoint import load_module
    from ..export.packed import Packed
    from ..export.tokenizer_files import load_tokenizer

    # random weights are numbers of half precision: kept so, and widened one layer at a time, they take half the memory
    modules = {part: load_module(checkpoint, part) for part in checkpoint.parts}
    packed = [Packed(part, own, "fp16") for part, own in modules.items() if lora is None or part != "unet"]
    parts: dict[str, Any] = {part: own.float() for part, own in modules.items()}
    for part in [part for part in modules if part.startswith("text_encoder")]:
        tokenizer = part.replace("text_encoder", "tokenizer")
        parts[tokenizer] = load_tokenizer(checkpoint.path / tokenizer)
    row = get_scheduler(str(recipe.defaults["scheduler"]), str(recipe.defaults.get("family", "diffusers")))
    scheduler = getattr(diffusers, str(row.diffusers)).from_config(dict(checkpoint.scheduler), **row.forced)
    if checkpoint.sdxl:
        pipe: Any = diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    else:
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **extra)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        for own in packed:
            stack.enter_context(own.computing())
        latents = pipe(
            PROMPT, num_inference_steps=STEPS, guidance_scale=recipe.defaults["guidance"], height=SIDE_PX,
            width=SIDE_PX, generator=torch.Generator().manual_seed(SEED), output_type="latent", eta=row.eta or 0.0,
        ).images  # fmt: skip
    return np.array(latents.numpy(), np.float32)


def ours(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Exports, draws the same, and compares."""
    wanted, bundle = np.load(folder / LATENTS), folder / recipe.name
    loras = [(folder / LORA, 1.0)] if recipe.loras else []
    options = {**recipe.export_options(), "loras": loras}
    report = export_bundle(model_source(recipe.name, random_weights=SEED), bundle, dtype="fp32", **options)
    export_gb = round(peak_mb() / 1024, 1)
    os.environ["VEGA_EDGE_CACHE_GB"] = "0"  # a compiled copy of each network would be of no use
    pipe = Pipeline.open(bundle, "onnxruntime-cpu", verify=False, memory="low")
    got = pipe(PROMPT, width=SIDE_PX, height=SIDE_PX, steps=STEPS, seed=SEED).latents
    pipe.close()
    return {
        "dtype": "fp32", "weights_gb": round(report.bytes / 1e9, 2), "scheduler": recipe.defaults["scheduler"],
        "guidance": recipe.defaults["guidance"], "lora_modules": len(loras) and _lora_modules(folder / LORA),
        "parts": {part.name: part.max_relative_error for part in report.parts},
        "latents_std": float(wanted.std()),
        "latents_error_of_std": float(np.abs(got - wanted).max() / wanted.std()),
        "export_peak_gb": export_gb, "peak_gb": round(peak_mb() / 1024, 1),
    }  # fmt: skip


def _lora_modules(path: Path) -> int:
    from ..safetensors_file import read_header

    return len(read_header(path).entries) // 2


SIDES = {"reference": reference, "ours": ours}


def compare(name: str) -> dict[str, Any]:
    start, row = time.monotonic(), {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            command = [sys.executable, "-m", "vega_edge.bench.full_size", name, "--side", side, "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name}: {side} ended with status {done.returncode}")
            row |= json.loads(done.stdout.splitlines()[-1])
    return {**row, "seconds": round(time.monotonic() - start), "measured": facts()}


def missed(row: dict[str, Any]) -> list[str]:
    found = [f"{row['model']}, {p}: {e:.1e}, goal {GOAL_PART:g}" for p, e in row["parts"].items() if e > GOAL_PART]
    if row["latents_error_of_std"] > GOAL_LATENTS:
        found.append(
            f"{row['model']}: latents differ by {row['latents_error_of_std']:.1e} of their standard deviation, "
            f"goal {GOAL_LATENTS:g}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one side, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/full-size.json"))
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](recipes()[arguments.models[0]], arguments.folder)))
        return
    rows: dict[str, dict[str, Any]] = {}
    if arguments.output.is_file():
        rows = {row["model"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    for name in arguments.models:
        rows[name] = compare(name)
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
