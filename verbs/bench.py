"""`vega-edge bench`: how fast a model draws on this machine, on each engine that works here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import EngineError
from .common import bar, number, size, whole


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model",
        nargs="?",
        default="demo-vegart",
        metavar="MODEL",
        help="a model's name (see: vega-edge models) or a bundle's folder; default: %(default)s",
    )
    p.add_argument(
        "--engine", action="append", metavar="NAME", help="may be repeated; default: all that work here, in turn"
    )
    p.add_argument(
        "--rounds", type=whole, default=5, metavar="N", help="pictures after the first; default: %(default)s"
    )
    p.add_argument("--steps", type=whole, metavar="N", help="denoising steps; default: the model's")
    p.add_argument("--guidance", type=number, metavar="G", help="1 or less for none; default: the model's")
    p.add_argument("--scheduler", metavar="NAME", help="default: the model's")
    p.add_argument("--samples", type=whole, default=1, metavar="N", help="pictures at once, 1 to 4; default: 1")
    p.add_argument("--size", type=size, metavar="WxH", help="in pixels, such as 128x128; default: the model's")
    p.add_argument("--memory", default="normal", metavar="HOW", help="normal or low; default: %(default)s")
    p.add_argument("--vae", default="full", metavar="WHICH", help="full or tiny; default: %(default)s")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: what the engine runs on")
    p.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    p.set_defaults(run=run)


def gpu(words: Sequence[str]) -> None:
    """`vega-edge bench gpu ...`: beside diffusers, with a command line of its own."""
    try:
        from ..bench import gpu
    except ModuleNotFoundError as failure:
        raise EngineError(
            f'bench gpu draws beside diffusers, and {failure.name} is not installed here; pip install "vega-edge[export]"'
        ) from failure
    gpu.main(words)


def run(arguments: argparse.Namespace) -> None:
    import sys

    from .. import engines
    from ..bench import machine, pictures
    from ..errors import UsageError, VegaEdgeError

    if arguments.rounds < 1:
        raise UsageError(f"--rounds must be 1 or more, got {arguments.rounds}")
    names = arguments.engine or [state.name for state in engines.available() if state.ok]
    opening = {"memory": arguments.memory, "vae": arguments.vae, "device": arguments.device}
    speeds, failed = [], list[str]()
    with bar(len(names)) as shown:
        for name in names:
            try:
                speeds.append(
                    pictures.measure_apart(
                        arguments.model, {**opening, "engine": name}, _options(arguments), arguments.rounds
                    )
                )
            except VegaEdgeError as error:
                if arguments.engine or len(names) == 1:
                    raise
                failed.append(f"{name}: {error}")
            shown.update()
    if not speeds:
        raise VegaEdgeError("; ".join(failed) or 'no engine works here; pip install "vega-edge[cpu]"')
    if arguments.json:
        facts = {"version": __version__, **machine.facts(commit=False)}
        found = {**facts, "model": arguments.model, "options": _options(arguments), "rounds": arguments.rounds}
        print(json.dumps({**found, "engines": [vars(speed) for speed in speeds], "failed": failed}, indent=2))
        return
    print(pictures.table(speeds))
    for line in failed:
        print(f"vega-edge: {line}", file=sys.stderr)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    width, height = arguments.size or (None, None)
    asked = {
        "steps": arguments.steps, "guidance": arguments.guidance, "scheduler": arguments.scheduler,
        "samples": arguments.samples, "width": width, "height": height,
    }  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}
