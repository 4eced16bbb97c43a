"""`vega-edge doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import json


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import doctor, models

    report = doctor.examine([models.bundles_folder()])
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else doctor.render(report))
