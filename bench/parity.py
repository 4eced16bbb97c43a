"""The same checkpoint, seed, scheduler and steps through diffusers and through vega-edge, in fp32.

    python -m vega_edge.bench.parity -o benchmarks/results/parity.json

exports the demo models (weights as they are, in fp32) and compares final latents and pictures. Exit status 1 where one is
further off than the project allows: 5e-4 of the largest latent, 60 dB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models import recipes
from ..runtime.pipeline import Pipeline
from ..runtime.schedulers import all_schedulers, get_scheduler
from .machine import facts, markdown

SCHEDULERS = [row.name for row in all_schedulers() if row.family == "diffusers"]
FEW = ("LCM", "TCD", "Euler Lightning")  # made for few steps
MAX_ERROR, MIN_PSNR_DB = 5e-4, 60.0  # a grid that is off by one timestep still reaches 58 dB
PROMPT, NEGATIVE = "a big red star above a small blue house on a yellow background", "a green circle"


@dataclass(frozen=True)
class Parity:
    """error: largest difference of the latents over their largest value. psnr_db: of the uint8 pictures, 99 where equal."""

    model: str
    scheduler: str
    steps: int
    guidance: float
    error: float
    psnr_db: float

    @property
    def good(self) -> bool:
        return self.error <= MAX_ERROR and self.psnr_db >= MIN_PSNR_DB


def reference_pipeline(name: str) -> Any:
    """diffusers' own pipeline of a demo model, its LoRA fused by diffusers."""
    import diffusers
    import torch

    recipe = recipes()[name]
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        recipe.checkpoint_path, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    for path, strength in recipe.lora_paths:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        pipe.fuse_lora(lora_scale=strength)
        pipe.unload_lora_weights()
    return pipe


def draw_reference(
    pipe: Any, scheduler: str, steps: int, guidance: float, negative: str | None, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Final latents [1, c, h, w] and the uint8 picture [h, w, 3]."""
    import diffusers
    import torch

    row = get_scheduler(scheduler)
    original, config = pipe.scheduler, pipe.scheduler.config
    # what a file that is silent on it means, see the row
    silent = {"skip_prk_steps": True} if row.name == "PNDM" and "skip_prk_steps" not in config else {}
    pipe.scheduler = getattr(diffusers, str(row.diffusers)).from_config(config, **row.forced, **silent)
    with torch.no_grad():
        latents = pipe(
            PROMPT, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, height=128, width=128,
            generator=torch.Generator().manual_seed(seed), output_type="latent",
            eta=row.eta or 0.0,  # for those whose step knows it; the pipeline's own default would make TCD's 0
        ).images  # fmt: skip
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.scheduler = original
    picture = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return latents.numpy(), np.asarray(picture)


def compare(
    ours: Pipeline,
    theirs: Any,
    scheduler: str,
    steps: int,
    guidance: float,
    negative: str | None = NEGATIVE,
    seed: int = 1234567890123,
) -> Parity:
    latents, picture = draw_reference(theirs, scheduler, steps, guidance, negative, seed)
    got = ours(
        PROMPT,
        scheduler=scheduler,
        family="diffusers",
        steps=steps,
        guidance=guidance,
        negative=negative if guidance > 1 else None,
        seed=seed,
        width=128,
        height=128,
    )
    error = float(np.abs(got.latents - latents).max() / np.abs(latents).max())
    return Parity(ours.name, scheduler, steps, guidance, error, psnr(np.asarray(got.images[0]), picture))


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape, the peak being 255; 99 where they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if mse == 0 else float(10 * np.log10(255**2 / mse))


def main() -> int:
    from ..export import export_bundle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes().items():
            if recipe.checkpoint_path is None:  # the full-size models have a command of their own
                continue
            bundle = Path(folder) / name
            export_bundle(recipe.checkpoint_path, bundle, **recipe.export_options())
            ours, theirs = Pipeline.open(bundle, "onnxruntime-cpu"), reference_pipeline(name)
            for scheduler in SCHEDULERS:
                steps = 4 if scheduler in FEW else 25
                rows += [compare(ours, theirs, scheduler, steps, guidance) for guidance in (0.0, 3.0)]
            ours.close()
    print(
        markdown(
            ["model", "scheduler", "steps", "guidance", "relative error of the latents", "PSNR of the picture"],
            [(r.model, r.scheduler, r.steps, f"{r.guidance:g}", f"{r.error:.1e}", f"{r.psnr_db:.0f} dB") for r in rows],
        )
    )
    if arguments.output:
        arguments.output.write_text(json.dumps({**facts(), "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    missed = shortfalls(rows)
    print("", *missed, sep="\n")
    return int(bool(missed))


def shortfalls(rows: list[Parity]) -> list[str]:
    return [
        f"{r.model}, {r.scheduler}, guidance {r.guidance:g}: {r.error:.1e} and {r.psnr_db:.0f} dB, goal {MAX_ERROR:g} and "
        f"{MIN_PSNR_DB:g} dB"
        for r in rows
        if not r.good
    ]


if __name__ == "__main__":
    sys.exit(main())
