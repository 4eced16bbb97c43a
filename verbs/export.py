"""`vega-edge export`: a checkpoint to a bundle of ONNX graphs."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, UsageError
from .common import bar, lora

if TYPE_CHECKING:
    from ..export import Progress

_log = logging.getLogger(__name__)


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="a model's name (see: vega-edge models), a diffusers folder, a .safetensors checkpoint, or "
        "hf:OWNER/NAME[@REVISION][/FILE] of the hub",
    )
    p.add_argument(
        "--from",
        dest="start",
        metavar="PLACE",
        help="take the named model's weights from this folder, file or hf: repository",
    )
    p.add_argument(
        "--allow-pickle", action="store_true", help="read .bin and .ckpt files too, with torch's weights_only"
    )
    p.add_argument(
        "--random-weights", type=_seed, metavar="SEED", help="make the weights up: for benchmarks, without a download"
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="BUNDLE",
        help="the folder to make; default for a model's name: where generate finds it",
    )
    p.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA to fuse in; may be repeated",
    )
    p.add_argument("--dtype", default="fp32", help="arithmetic: fp32, fp16, bf16 or int8; default: %(default)s")
    p.add_argument(
        "--weights", metavar="DTYPE", help="storage of the weights: fp32, fp16, bf16 or int8; default: as --dtype"
    )
    p.add_argument(
        "--tiny-vae",
        metavar="PLACE",
        help="an AutoencoderTiny for fast decoding: a folder, or hf:OWNER/NAME, such as hf:madebyollin/taesdxl",
    )
    p.add_argument(
        "--vae",
        default="full",
        metavar="NAME",
        help="the decoder pictures are made with: full (default; the tiny one goes beside it), or tiny, in its place",
    )
    p.add_argument("--name", help="the bundle's name; default: that of the model or of the folder")
    p.add_argument("--overwrite", action="store_true", help="replace BUNDLE where it exists")
    p.add_argument("--json", action="store_true", help="print the bundle, its parts, sizes and differences as JSON")
    p.add_argument("-v", "--verbose", action="store_true", help="say more")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import models
    from ..export import export_bundle, format_report, lora_places, model_source, tiny_vae_place

    source = model_source(
        arguments.source,
        start=arguments.start,
        allow_pickle=arguments.allow_pickle,
        random_weights=arguments.random_weights,
    )
    recipe = source.recipe
    options: dict[str, Any] = recipe.export_options() if recipe else {"name": None}
    options["name"] = arguments.name or options["name"]
    named = recipe is not None and arguments.random_weights is None  # made-up weights never go by the model's name
    output = arguments.output or (models.bundles_folder() / recipe.name if recipe and named else None)
    if output is None:
        raise UsageError(f"say where the bundle goes: vega-edge export {arguments.source} -o BUNDLE")
    if not arguments.output:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise ExportError(f"{output.parent} can't be made ({failure.strerror}); name a folder with -o") from failure
    options["loras"] = lora_places(source, arguments.lora)
    if recipe and recipe.loras and not named:
        _log.warning(
            "the LoRA of %s is left out: fused, it would change made-up numbers and no shape; --lora FILE adds one",
            recipe.name,
        )
    tiny_vae = tiny_vae_place(arguments.tiny_vae) if arguments.tiny_vae else None
    with bar(0) as shown:
        report = export_bundle(
            source, output, dtype=arguments.dtype, weights=arguments.weights, tiny_vae=tiny_vae,
            vae=arguments.vae, progress=_progress(shown), overwrite=arguments.overwrite, **options,
        )  # fmt: skip
    if arguments.json:
        print(json.dumps(asdict(report), indent=2, default=str))
        return
    print(format_report(report), file=sys.stderr)
    print(output)


def _progress(shown: Any) -> Callable[[Progress], None]:
    """Moves the bar on; where there is none, since stderr is no terminal, each part gets a line: it takes minutes."""
    stderr, begun = sys.stderr, set[str]()  # this stderr: an export's own libraries write to another

    def progress(at: Progress) -> None:
        if shown.disable and at.part not in begun:
            begun.add(at.part)
            print(f"vega-edge: exporting {at.part}, {at.index - 1} of {at.total} phases done", file=stderr, flush=True)
        shown.total = at.total
        shown.set_description_str(f"{at.part}: {at.phase}", refresh=False)
        shown.update(at.index - 1 - shown.n)
        shown.refresh()

    return progress


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 999999999999999, got {text!r}")
    return int(text)
