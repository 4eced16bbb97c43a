"""Trains the embedded models from nothing: `python -m vega_edge.demo.train --out demo/weights`.

About eight hours on two AVX2 cores, sixteen of CPU time; every stage can be run alone once those before it are done. On Linux, first

    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1

or up to half the time goes into giving memory back to the system and asking for it again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ...models import bundles_folder
from .autoencoder import train_autoencoder, train_decoder
from .base import train_base
from .distill import distill
from .reading import train_encoders
from .tiny_autoencoder import train_tiny_autoencoder

STEPS = {
    "autoencoder": 4600,
    "decoder": 2000,
    "text-encoders": 1200,
    "demo-vega": 22_000,
    "demo-vegart-lora": 3200,
    "demo-small-sd": 8000,
    "demo-tiny-sd": 3000,
    "tiny-autoencoder": 1500,
}


_TUNED = ("demo-vega", "demo-vegart-lora", "demo-small-sd", "demo-tiny-sd")  # take a --peak-lr


def _check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What a stage would not look at, or what two stages can't share, is an error."""
    stages = arguments.stages or list(STEPS)
    if arguments.peak_lr is not None and (other := [stage for stage in stages if stage not in _TUNED]):
        parser.error(f"--peak-lr is not for {', '.join(other)}; it is for {', '.join(_TUNED)}")
    if arguments.start:
        if len(stages) > 1:
            parser.error(f"--start is for one stage, got {len(stages)}: each goes on from a checkpoint of its own kind")
        if stages[0] not in (*_TUNED, "text-encoders"):
            parser.error(f"--start is not for {stages[0]}; it is for text-encoders, {', '.join(_TUNED)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"which; default: all of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoints' folder, such as demo/weights")
    parser.add_argument(
        "--cache",
        type=Path,
        default=bundles_folder().parent / "training",
        help="autoencoder, latents, snapshots; default: %(default)s",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one a core")
    parser.add_argument(
        "--start",
        type=Path,
        help="go on from this checkpoint (or LoRA file), not from what the stages before have left",
    )
    parser.add_argument("--peak-lr", type=float, help="default: 2e-3; with --start, half of it is enough")
    parser.add_argument("--steps", type=int, help="another number of updates, for trying out")
    arguments = parser.parse_args()
    for stage in arguments.stages:
        if stage not in STEPS:
            parser.error(f"unknown stage {stage!r}; there are: {', '.join(STEPS)}")
    _check_options(parser, arguments)
    peak_lr = 2e-3 if arguments.peak_lr is None else arguments.peak_lr
    torch.set_num_threads(arguments.processes)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    out, cache, n = arguments.out, arguments.cache, arguments.processes
    vae = cache / "autoencoder"
    runs: dict[str, Callable[[int], object]] = {
        "autoencoder": lambda steps: train_autoencoder(vae, steps, processes=n),
        "decoder": lambda steps: train_decoder(vae, steps, processes=n),
        "text-encoders": lambda steps: train_encoders(cache / "text-encoders", steps, start=arguments.start),
        "demo-vegart-lora": lambda steps: distill(
            out / "demo-vega", vae, cache, out / "demo-vegart-lora", steps,
            start=arguments.start, peak_lr=peak_lr, processes=n,
        ),
        "tiny-autoencoder": lambda s: train_tiny_autoencoder(vae, out / "demo-tiny-vae", s, processes=n),
    }  # fmt: skip
    for stage in arguments.stages or STEPS:
        steps = arguments.steps or STEPS[stage]
        if stage in runs:
            runs[stage](steps)
        else:
            start, teacher = arguments.start, None if stage == "demo-vega" else out / "demo-vega"
            start = start or {"demo-vega": cache / "text-encoders", "demo-tiny-sd": out / "demo-small-sd"}.get(stage)
            train_base(
                stage, vae, cache, out / stage, steps,
                start=start, teacher=teacher, peak_lr=peak_lr, processes=n,
            )  # fmt: skip


if __name__ == "__main__":
    main()
