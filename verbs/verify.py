"""`vega-edge verify`: is a bundle whole, and does it run here."""

from __future__ import annotations

import argparse
import json


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or a model's name")
    p.add_argument("--engine", default="auto", metavar="NAME", help="what runs the graphs; default: %(default)s")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: what the engine runs on")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import models, verify

    verdict = verify.verify(models.find_bundle(arguments.bundle), arguments.engine, arguments.device)
    print(json.dumps(verdict.to_dict(), indent=2) if arguments.json else verify.render(verdict))
    verify.raise_for(verdict)
