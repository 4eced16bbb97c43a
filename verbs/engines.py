"""`vega-edge engines`: the built engines of a bundle: list, remove, clean up."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineError, UsageError

if TYPE_CHECKING:
    from ..engines.plan_store import Plan, PlanStore


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "action", choices=("ls", "rm", "gc"), help="list; remove those named; remove what can't be used any more"
    )
    p.add_argument("bundle", metavar="BUNDLE", help="a model's name, or a bundle's folder")
    p.add_argument("files", metavar="FILE", nargs="*", help="of rm: names that ls printed")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ..bundle import Bundle
    from ..engines.plan_store import PlanStore
    from ..models import find_bundle

    store = PlanStore(find_bundle(arguments.bundle))
    if arguments.files and arguments.action != "rm":
        raise UsageError(f"engines {arguments.action} takes no files; to remove some: engines rm BUNDLE FILE ...")
    if not store.folder.is_dir() and not store.beside.is_dir():
        Bundle.open(store.bundle, verify=False)  # what is no bundle is not one without engines
    if arguments.action == "ls":
        _list(store, arguments.json)
    elif arguments.action == "rm":
        _say(_remove(store, arguments.files), arguments.json)
    else:
        _say(_clean(store), arguments.json)


def _say(names: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(names, indent=2))
    elif names:
        print(*names, sep="\n")


def _list(store: PlanStore, as_json: bool) -> None:
    plans, installed = store.plans(), _installed()
    faults = [store.fault(plan, installed) for plan in plans]
    if as_json:
        told = [{**dataclasses.asdict(p), "unusable": fault} for p, fault in zip(plans, faults, strict=True)]
        print(json.dumps(told, indent=2))
        return
    for plan, fault in zip(plans, faults, strict=True):
        print(f"{plan.file}  {plan.bytes / 1e6:.1f} MB  {_describe(plan)}{f'  ({fault})' if fault else ''}")
    folders = " and ".join(map(str, dict.fromkeys([store.folder, *(store.path(plan).parent for plan in plans)])))
    print(f"{len(plans)} engines, {sum(plan.bytes for plan in plans) / 1e6:.1f} MB in {folders}", file=sys.stderr)


def _describe(plan: Plan) -> str:
    shapes = "; ".join(
        f"{name} {'..'.join('x'.join(map(str, shape)) for shape in dict.fromkeys(ranges))}"
        for name, ranges in plan.profile.items()
    )
    extras = [*([plan.precision] if plan.precision != "graph" else []), *plan.flags]
    extras += [f"lora {lora.sha256[:8]}:{lora.strength:g}" for lora in plan.loras]
    return f"{plan.library} {plan.version} {','.join(plan.targets)}  {shapes}  {' '.join(extras)}".rstrip()


def _remove(store: PlanStore, files: list[str]) -> list[str]:
    plans = {plan.file: plan for plan in store.own()}
    if not files:
        raise UsageError("engines rm: name the files to remove, as engines ls prints them")
    for file in files:
        if file not in plans:
            raise UsageError(f"there is no engine {file} in {store.folder}; see: vega-edge engines ls {store.bundle}")
    names = list(dict.fromkeys(files))
    store.remove(tuple(plans[file] for file in names))
    return names


def _clean(store: PlanStore) -> list[str]:
    installed = _installed()
    unusable = tuple(plan for plan in store.own() if store.fault(plan, installed))
    strays = store.stray(installed)
    there = [*strays, *(path for plan in unusable if (path := store.folder / plan.file).is_file())]
    freed = sum(map(_bytes, there))
    if unusable:
        store.remove(unusable)
    for path in strays:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    missing = len(unusable) + len(strays) - len(there)
    gone = f"; {missing} more were listed, and missing" if missing else ""
    print(f"{len(there)} files, {freed / 1e6:.1f} MB removed from {store.folder}{gone}", file=sys.stderr)
    return [*(plan.file for plan in unusable), *(path.name for path in strays)]


def _installed() -> dict[str, str]:
    """Library -> version. Of one that is not here nothing is removed: another environment may have it."""
    from ..export.trt_library import load_library

    found = {}
    for name in ("tensorrt-rtx", "tensorrt"):
        with contextlib.suppress(EngineError):
            found[name] = load_library(name).version
    return found


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
