"""`vega-edge models`: the models, or the schedulers, that this version knows."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("--schedulers", action="store_true", help="list the schedulers instead")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=lambda arguments: (_schedulers if arguments.schedulers else _models)(arguments))


def _models(arguments: argparse.Namespace) -> None:
    from ..models import recipes

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
    from ..runtime import scheduler_list

    print(json.dumps(scheduler_list.to_dict(), indent=2) if arguments.json else scheduler_list.render())
