"""`vega-edge doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import json


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="a model's name, or a bundle's folder: what auto takes for it"
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N: what auto takes there")
    p.add_argument("--vae", default="full", metavar="WHICH", help="full or tiny: what BUNDLE draws with; default: full")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import doctor, models
    from ..bundle import Bundle
    from ..errors import UsageError, unknown
    from ..runtime.parts import VAES
    from ..runtime.vae_choice import unused_parts

    if arguments.vae not in VAES:
        raise unknown("vae", arguments.vae, VAES)
    if arguments.vae != "full" and not arguments.bundle:
        raise UsageError("doctor --vae is about a BUNDLE: name one")
    model = models.find_bundle(arguments.bundle) if arguments.bundle else None
    unused = unused_parts(Bundle.open(model, verify=False), arguments.vae) if model else frozenset()
    report = doctor.examine([models.bundles_folder()], model, arguments.device, unused, models.compiled_folder())
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else doctor.render(report))
