"""The command line: `vega-edge generate|models|export|doctor`. Results go to stdout, all else to stderr.

Exit status: 0 done, 1 an error of ours in one line, 2 a wrong argument, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import ExportError, UsageError, VegaEdgeError

if TYPE_CHECKING:
    from .models import Recipe
    from .runtime.pipeline import Pipeline, Result
    from .runtime.request import Request


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Parser(argparse.ArgumentParser):
    """Says a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = _parser().parse_args(argv)
    level = logging.INFO if getattr(arguments, "verbose", False) else logging.WARNING
    logging.basicConfig(level=level, format="vega-edge: %(message)s", stream=sys.stderr, force=True)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name that the output's encoding lacks must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments.verb(arguments)
        sys.stdout.flush()
    except VegaEdgeError as error:
        print(f"vega-edge: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vega-edge: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            if error.errno not in _NO_ROOM:
                raise
            print(f"vega-edge: the output can't be written: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(
            OSError
        ):  # the reader of stdout went away, or it is full: nothing more, not even at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _one_line(text: object) -> str:
    """An error quotes what it was given, which may have lines of its own."""
    return " ".join(str(text).split("\n"))


def _parser() -> _Parser:
    parser = _Parser(prog="vega-edge", description="Distilled text-to-image models on your own device.")
    parser.add_argument("--version", action="version", version=f"vega-edge {__version__}")
    verbs = parser.add_subparsers(dest="name", metavar="VERB", required=True)
    _add_generate(
        verbs.add_parser("generate", help="draw pictures from a prompt", description="Draw pictures from a prompt.")
    )
    _add_export(
        verbs.add_parser(
            "export",
            help="turn a checkpoint into a bundle of ONNX graphs",
            description="Turn a local diffusers checkpoint into a bundle of ONNX graphs. Needs the export extra.",
        )
    )
    models = verbs.add_parser("models", help="list the models", description="List the models this version knows.")
    models.add_argument("--schedulers", action="store_true", help="list the schedulers instead")
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(verb=lambda arguments: (_schedulers if arguments.schedulers else _models)(arguments))
    doctor = verbs.add_parser(
        "doctor",
        help="say what works here, and why the rest does not",
        description="Say which engines work here and, for each other, why not and what to install.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(verb=_doctor)
    return parser


def _add_generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", metavar="PROMPT", help="what to draw; may be empty")
    p.add_argument(
        "--model",
        default="demo-vegart",
        help="a model's name (see: vega-edge models) or a bundle's folder; default: %(default)s",
    )
    p.add_argument("--negative", metavar="TEXT", help="what to keep away from; needs guidance above 1")
    p.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: the model's")
    p.add_argument(
        "--guidance", type=float, metavar="G", help="classifier-free guidance, 1 or less for none; default: the model's"
    )
    _add_sampling(p)
    p.add_argument("--seed", type=int, default=-1, metavar="S", help="0 to 999999999999999; -1, the default, picks one")
    p.add_argument(
        "--samples", type=int, default=1, metavar="N", help="1 to 4 pictures, of seeds S, S+1, ...; default: 1"
    )
    p.add_argument("--size", type=_size, metavar="WxH", help="in pixels, such as 128x128; default: the model's")
    p.add_argument(
        "--engine",
        default="auto",
        metavar="NAME",
        help="what runs the graphs (see: vega-edge doctor); default: auto, the best one found",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".png, .jpg or .webp; several samples get their seed into the name; default: PROMPT-SEED.png in this folder",
    )
    p.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    p.add_argument("--json", action="store_true", help="print files, parameters and timings as JSON")
    p.add_argument("-v", "--verbose", action="store_true", help="say which engine was chosen, and why")
    p.set_defaults(verb=_generate)


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
    p.add_argument("--eta", type=float, metavar="E", help="share of fresh noise, 0 to 1; default: the scheduler's")
    p.add_argument(
        "--guidance-rescale",
        type=float,
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


def _add_export(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="a model's name, or the folder of a diffusers checkpoint")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="BUNDLE",
        help="the folder to make; default for a model's name: where generate finds it",
    )
    p.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA to fuse in; may be repeated",
    )
    p.add_argument("--dtype", default="fp32", help="arithmetic of the graphs, fp32 or fp16; default: %(default)s")
    p.add_argument("--weights", metavar="DTYPE", help="storage of the weights, fp32 or fp16; default: as --dtype")
    p.add_argument("--tiny-vae", type=Path, metavar="FOLDER", help="an AutoencoderTiny to decode with")
    p.add_argument("--name", help="the bundle's name; default: that of the model or of the folder")
    p.add_argument("--overwrite", action="store_true", help="replace BUNDLE where it exists")
    p.add_argument("--json", action="store_true", help="print the bundle, its parts, sizes and differences as JSON")
    p.add_argument("-v", "--verbose", action="store_true", help="say more")
    p.set_defaults(verb=_export)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 128x128, got {text!r}")
    return int(match[1]), int(match[2])


def _lora(text: str) -> tuple[Path, float]:
    file, colon, strength = text.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):
            return Path(file), float(strength)
    return Path(text), 1.0


# -- generate ---------------------------------------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> None:
    from .runtime import pictures
    from .runtime.pipeline import Pipeline

    pipe = Pipeline.open(arguments.model, arguments.engine)
    width, height = arguments.size or (None, None)
    request = pipe.request(
        arguments.prompt, negative=arguments.negative, steps=arguments.steps, guidance=arguments.guidance, width=width,
        height=height, scheduler=arguments.scheduler, seed=arguments.seed, samples=arguments.samples,
        family=arguments.family, schedule=arguments.schedule, eta=arguments.eta, rng=arguments.rng,
        noise_dtype=arguments.noise_dtype, guidance_rescale=arguments.guidance_rescale,
    )  # fmt: skip
    files = _targets(request, arguments.output, arguments.overwrite)
    with _bar(pipe.total(request)) as bar:
        result = pipe.run(request, lambda step: bar.update())
    for i, image in enumerate(result.images):
        if not arguments.output:
            files[i] = pictures.free_name(files[i])  # another process may have taken it meanwhile
        pictures.save(image, files[i], request.parameters(pipe.name, __version__, i), arguments.overwrite)
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
    from .runtime.pictures import check_target, free_name

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
        "width": r.width, "height": r.height,
        "pictures": [{"file": str(f), "seed": s} for f, s in zip(files, r.seeds, strict=True)],
        "seconds": {k: round(v, 4) for k, v in result.timings.items()},
    }  # fmt: skip


@contextlib.contextmanager
def _bar(total: int | None) -> Iterator[Any]:
    """A progress bar on stderr, where that is a terminal; total None: unknown."""
    from tqdm import tqdm

    with tqdm(total=total, disable=None, leave=False, file=sys.stderr) as bar:
        yield bar


# -- export, models, doctor -------------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> None:
    from . import models
    from .export import Progress, export_bundle, format_report

    recipe = models.recipes().get(arguments.source)
    source = _checkpoint(recipe) if recipe else Path(arguments.source)
    options = recipe.export_options() if recipe else {"name": None, "loras": []}
    options["loras"] += arguments.lora
    options["name"] = arguments.name or options["name"]
    output = arguments.output or (models.bundles_folder() / recipe.name if recipe else None)
    if output is None:
        raise UsageError(f"say where the bundle goes: vega-edge export {arguments.source} -o BUNDLE")
    if not arguments.output:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise ExportError(f"{output.parent} can't be made ({failure.strerror}); name a folder with -o") from failure
    with _bar(0) as bar:

        def progress(at: Progress) -> None:
            bar.total = at.total
            bar.set_description_str(f"{at.part}: {at.phase}", refresh=False)
            bar.update(at.index - 1 - bar.n)
            bar.refresh()

        report = export_bundle(
            source, output, dtype=arguments.dtype, weights=arguments.weights, tiny_vae=arguments.tiny_vae,
            progress=progress, overwrite=arguments.overwrite, **options,
        )  # fmt: skip
    if arguments.json:
        print(json.dumps(asdict(report), indent=2, default=str))
        return
    print(format_report(report), file=sys.stderr)
    print(output)


def _checkpoint(recipe: Recipe) -> Path:
    if not recipe.checkpoint_path.is_dir():
        raise ExportError(
            f"the checkpoint of {recipe.name} is not part of this install ({recipe.checkpoint_path} does not exist); export it in a clone of the project"
        )
    return recipe.checkpoint_path


def _models(arguments: argparse.Namespace) -> None:
    from .models import recipes

    rows = [
        {
            "name": r.name,
            "title": r.title,
            "ready": r.ready,
            "state": "ready" if r.ready else f"not exported yet; {r.cure}",
            "bundle": str(r.bundle_path),
            "licence": r.licence,
            "defaults": dict(r.defaults),
            "limits": dict(r.limits),
        }
        for r in recipes().values()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        d: Any = row["defaults"]
        print(
            f"{row['name']:<{width}}  {row['title']}; {d['scheduler']}, {d['steps']} steps, guidance {d['guidance']:g}, {d['width']}x{d['height']}  [{row['state']}]"
        )


def _schedulers(arguments: argparse.Namespace) -> None:
    from .runtime import scheduler_list

    print(json.dumps(scheduler_list.to_dict(), indent=2) if arguments.json else scheduler_list.render())


def _doctor(arguments: argparse.Namespace) -> None:
    from . import doctor, models

    report = doctor.examine([models.bundles_folder()])
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else doctor.render(report))


if __name__ == "__main__":
    sys.exit(main())
