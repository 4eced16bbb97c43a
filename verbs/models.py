"""`vega-edge models`: the models, or the schedulers, that this version knows."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import Recipe


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("--schedulers", action="store_true", help="list the schedulers instead")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=lambda arguments: (_schedulers if arguments.schedulers else _models)(arguments))


def _models(arguments: argparse.Namespace) -> None:
    from ..models import recipes

    rows = [_facts(recipe) for recipe in recipes().values()]
    print(json.dumps(rows, indent=2) if arguments.json else _table(rows))


def _facts(r: Recipe) -> dict[str, Any]:
    """What is known of a model without opening it; sizes in bytes, 0 for what is not on this disk."""
    from ..models import storage

    hubs = [origin.hub for origin in r.sources] + [lora.hub for lora in r.loras]
    repositories = sorted({hub for hub in hubs if hub})
    return {
        "name": r.name,
        "title": r.title,
        "ready": r.ready,
        "state": "ready" if r.ready else f"not exported yet; {r.cure}",
        "bundle": str(r.bundle_path),
        "bundle_bytes": storage.folder_bytes(r.bundle_path) if r.ready else 0,
        "licence": r.licence,
        "sources": [str(origin) for origin in r.sources],
        "loras": [f"hf:{lora.hub}/{lora.file}" if lora.hub else lora.file for lora in r.loras],
        "parameters": dict(r.parameters),
        "download_bytes": r.download_bytes,
        "downloaded_bytes": sum(map(storage.downloaded_bytes, repositories)),
        "exported_bytes": {"fp32": 4 * sum(r.parameters.values()), "fp16": 2 * sum(r.parameters.values())},
        "defaults": dict(r.defaults),
        "limits": dict(r.limits),
        "api_slugs": list(r.api_slugs),
        "api_limits": dict(r.api_limits),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """For people: as wide as the terminal, or 100 columns."""
    columns = max(shutil.get_terminal_size((100, 24)).columns, 60)
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        d = row["defaults"]
        drawn = f"{d['scheduler']}, {d['steps']} steps, guidance {d['guidance']:g}, {d['width']}x{d['height']}"
        facts = ["; ".join([row["title"], drawn]), "; ".join(_details(row)), f"[{row['state']}]"]
        name = f"{row['name']:<{width}}  "
        for fact in facts:
            lines += textwrap.wrap(
                fact, columns, initial_indent=name, subsequent_indent=" " * (width + 2),
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            name = " " * len(name)
    return "\n".join(lines)


def _details(row: dict[str, Any]) -> list[str]:
    """'1647 M weights (unet 745 M); 3.3 GB to download; exported: fp16 3.3 GB, fp32 6.6 GB; on this disk: nothing; ...'"""
    facts = []
    if parameters := row["parameters"]:
        facts.append(f"{_millions(sum(parameters.values()))} weights (unet {_millions(parameters['unet'])})")
        facts += [f"{_size(row['download_bytes'])} to download in fp16"] if row["download_bytes"] else []
        facts.append("exported " + ", ".join(f"{d} {_size(row['exported_bytes'][d])}" for d in ("fp16", "fp32")))
    here = [f"download {_size(row['downloaded_bytes'])}"] if row["downloaded_bytes"] else []
    here += [f"bundle {_size(row['bundle_bytes'])}"] if row["bundle_bytes"] else []
    facts.append(f"on this disk: {', '.join(here) or 'nothing'}")
    facts += [f"from {' or '.join(row['sources'])}"] if row["sources"] else []
    return [*facts, row["licence"]]


def _size(count: int) -> str:
    """In units of 10^6 or 10^9 bytes, as disks and download pages count."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:.0f} M" if count >= 1e8 else f"{count / 1e6:.1f} M"


def _schedulers(arguments: argparse.Namespace) -> None:
    from ..runtime import scheduler_list

    print(json.dumps(scheduler_list.to_dict(), indent=2) if arguments.json else scheduler_list.render())
