"""`vega-edge doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import json


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="a model's name, or a bundle's folder: what auto takes for it"
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N: what auto takes there")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import doctor, models

    report = doctor.examine(
        [models.bundles_folder()], models.find_bundle(arguments.bundle) if arguments.bundle else None, arguments.device
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else doctor.render(report))
