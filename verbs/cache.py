"""`vega-edge cache`: what engines compiled and keep for the next start: how much it is, and removing it."""

from __future__ import annotations

import argparse
import json
import sys


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "action", choices=("show", "clear"), nargs="?", default="show",
        help="show: size, limit and folder (the default); clear: remove all of it; it is made again when needed",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from .. import doctor
    from ..models import compiled_folder

    folder = compiled_folder()
    if arguments.action == "show":
        found = doctor.cache_at(folder)
        print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
        return
    from ..engines import compiled

    removed, stay = compiled.clear(folder)
    if arguments.json:
        print(json.dumps([str(each.folder) for each in removed], indent=2))
    left = f"; {len(stay)} in use, {sum(each.bytes for each in stay) / 1e6:.1f} MB, stay" if stay else ""
    freed = sum(each.bytes for each in removed) / 1e6
    print(f"{len(removed)} folders, {freed:.1f} MB removed from {folder}{left}", file=sys.stderr)
