"""`vega-edge generate`: a prompt to picture files."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .common import bar, file_name, lora, number, size, warn_of_random_weights, whole

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline, Result
    from ..runtime.request import Request


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", metavar="PROMPT", help="what to draw; may be empty")
    p.add_argument(
        "--model",
        default="demo-vegart",
        help="a model's name (see: vega-edge models) or a bundle's folder; default: %(default)s",
    )
    p.add_argument("--negative", metavar="TEXT", help="what to keep away from; needs guidance above 1")
    p.add_argument("--steps", type=whole, metavar="N", help="denoising steps; default: the model's")
    p.add_argument(
        "--guidance",
        type=number,
        metavar="G",
        help="classifier-free guidance, 1 or less for none; default: the model's",
    )
    _add_sampling(p)
    _add_picture(p)
    _add_opening(p)
    p.add_argument(
        "--seed", type=whole, default=-1, metavar="S", help="0 to 999999999999999; -1, the default, picks one"
    )
    p.add_argument(
        "--samples", type=whole, default=1, metavar="N", help="1 to 4 pictures, of seeds S, S+1, ...; default: 1"
    )
    p.add_argument("--size", type=size, metavar="WxH", help="in pixels, such as 128x128; default: the model's")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: what the engine runs on")
    p.add_argument(
        "-o",
        "--output",
        type=file_name,
        metavar="FILE",
        help=".png, .jpg or .webp; several samples get their seed into the name; default: PROMPT-SEED.png in this folder",
    )
    p.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    p.add_argument("--json", action="store_true", help="print files, parameters and timings as JSON")
    p.add_argument("-v", "--verbose", action="store_true", help="say which engine was chosen, and why")
    p.set_defaults(run=run)


def _add_sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--scheduler",
        metavar="NAME",
        help="such as Euler, 'DPM++ 2M Karras' or LCM (see: vega-edge models --schedulers); default: the model's",
    )
    p.add_argument(
        "--family",
        metavar="NAME",
        help="what a scheduler's name means where both have it: diffusers or a1111; default: the model's",
    )
    p.add_argument(
        "--schedule",
        metavar="NAME",
        help="noise levels to walk with any scheduler, such as karras or sgm_uniform; default: the scheduler's own",
    )
    p.add_argument("--eta", type=number, metavar="E", help="share of fresh noise, 0 to 1; default: the scheduler's")
    p.add_argument(
        "--guidance-rescale",
        type=number,
        metavar="R",
        help="0 to 1, how much of the contrast that guidance adds is taken back; default: 0",
    )
    p.add_argument(
        "--rng",
        metavar="NAME",
        help="where noise comes from: torch, its CPU generator (default), or nv, AUTOMATIC1111's NV source",
    )
    p.add_argument(
        "--noise-dtype", metavar="DTYPE", help="fp32 (default), or fp16 to draw as pipelines in half precision do"
    )


def _add_picture(p: argparse.ArgumentParser) -> None:
    p.add_argument("--image", type=file_name, metavar="FILE", help="a picture to start from, cropped to the size")
    p.add_argument(
        "--strength", type=number, metavar="S", help="how far to go from --image: up to 1, all the way; default: 0.6"
    )
    p.add_argument(
        "--long-prompt", action="store_true", help="read all of a prompt, 75 tokens at a time, not the first 75"
    )
    p.add_argument(
        "--prompt-syntax",
        metavar="NAME",
        help="plain: punctuation is text; a1111: (word:1.3), [word] and, with --long-prompt, BREAK mean what they do there; default: the model's",
    )


def _add_opening(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--engine",
        default="auto",
        metavar="NAME",
        help="what runs the graphs (see: vega-edge doctor); default: auto, the best one found",
    )
    p.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA to add to the model's weights, in memory; may be repeated",
    )
    p.add_argument(
        "--memory",
        default="normal",
        metavar="HOW",
        help="normal, or low for small boards: networks are opened one after another; default: %(default)s",
    )
    p.add_argument(
        "--vae",
        default="full",
        metavar="WHICH",
        help="full, or tiny for the bundle's fast decoder; default: %(default)s",
    )


def run(arguments: argparse.Namespace) -> None:
    from ..runtime import pictures
    from ..runtime.init_image import read_picture
    from ..runtime.pipeline import Pipeline

    image = read_picture(arguments.image) if arguments.image else None
    if arguments.output:  # before gigabytes are read
        pictures.check_name(arguments.output)
        if arguments.samples == 1:
            pictures.check_target(arguments.output, arguments.overwrite)
    pipe = Pipeline.open(
        arguments.model, arguments.engine, loras=arguments.lora, memory=arguments.memory, vae=arguments.vae,
        device=arguments.device,
    )  # fmt: skip
    with contextlib.closing(pipe):
        _draw(pipe, image, arguments)


def _draw(pipe: Pipeline, image: Any, arguments: argparse.Namespace) -> None:
    from ..runtime import pictures

    warn_of_random_weights(pipe.bundle)
    width, height = arguments.size or (None, None)
    request = pipe.request(
        arguments.prompt, negative=arguments.negative, steps=arguments.steps, guidance=arguments.guidance, width=width,
        height=height, scheduler=arguments.scheduler, seed=arguments.seed, samples=arguments.samples,
        family=arguments.family, schedule=arguments.schedule, eta=arguments.eta, rng=arguments.rng,
        noise_dtype=arguments.noise_dtype, guidance_rescale=arguments.guidance_rescale, image=image,
        strength=arguments.strength, long_prompt=arguments.long_prompt or None, prompt_syntax=arguments.prompt_syntax,
    )  # fmt: skip
    files = _targets(request, arguments.output, arguments.overwrite)
    with bar(pipe.total(request)) as shown:
        result = pipe.run(request, lambda step: shown.update())
    for i, image in enumerate(result.images):
        if not arguments.output:
            files[i] = pictures.free_name(files[i])  # another process may have taken it meanwhile
        pictures.save(image, files[i], request.parameters(pipe.title, __version__, i), arguments.overwrite)
    if arguments.json:
        print(json.dumps(_describe(pipe, result, files), indent=2))
        return
    stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in result.timings.items())
    print(
        f"{pipe.name} on {pipe.engine}, seed {request.seed}: {sum(result.timings.values()):.3f} s ({stages})",
        file=sys.stderr,
    )
    print(*files, sep="\n")


def _targets(request: Request, output: Path | None, overwrite: bool) -> list[Path]:
    """One file a picture, checked before anything is drawn. Several pictures get their seed into their name."""
    from ..runtime.pictures import check_target, free_name

    if output is None:
        words = re.sub(r"[^\w]+", "-", request.prompt.lower()).strip("-").encode()[:60].decode(errors="ignore")
        words = words.strip("-") or "picture"  # 60 bytes: file systems count those, and stop at 255
        files = [free_name(Path(f"{words}-{seed}.png")) for seed in request.seeds]
    elif request.samples == 1:
        files = [output]
    else:
        files = [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in request.seeds]
    for file in files:
        check_target(file, overwrite)
    return files


def _describe(pipe: Pipeline, result: Result, files: list[Path]) -> dict[str, Any]:
    r = result.request
    return {
        "model": pipe.name, "engine": pipe.engine, "prompt": r.prompt, "negative": r.negative, "steps": r.steps,
        "guidance": r.guidance, "guidance_rescale": r.guidance_rescale, "scheduler": r.scheduler, "family": r.family,
        "schedule": r.schedule, "eta": r.eta, "rng": r.rng, "noise_dtype": r.noise_dtype,
        "width": r.width, "height": r.height, "strength": r.strength if r.image else None,
        "long_prompt": r.long_prompt, "prompt_syntax": r.prompt_syntax,
        "loras": [{"file": str(file), "strength": strength} for file, strength in pipe.loras],
        "pictures": [{"file": str(f), "seed": s} for f, s in zip(files, r.seeds, strict=True)],
        "seconds": {k: round(v, 4) for k, v in result.timings.items()},
    }  # fmt: skip
