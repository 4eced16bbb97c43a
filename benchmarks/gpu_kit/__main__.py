"""python -m benchmarks.gpu_kit prepare | plan, here; receive | run, on the GPU machine; report, of what came back."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from . import runner, steps, store

KIT = Path("build") / "gpu-kit"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kit", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("prepare", help="fetch the wheels, repack and cut them, and print the commands to run there")
    p.add_argument(
        "--preset", type=int, default=9, help="of xz, 0 to 9, which takes 0.7 GB of memory; default: %(default)s"
    )
    for each in (p, verbs.add_parser("plan", help="print the commands of what was prepared again")):
        each.add_argument("--back", default="", metavar="FOLDER", help="where results come back from, as the machine's shell spells it")  # fmt: skip
        each.add_argument("--kit", type=Path, default=KIT, metavar="FOLDER", help="default: %(default)s")
    p = verbs.add_parser("receive", help="append one part to the store, and unpack what is complete")
    p.add_argument("part", type=Path)
    p.add_argument("--start", nargs="+", action="append", default=[], metavar="STEP", help="then run these in the background")  # fmt: skip
    p.add_argument("--store", type=Path, default=store.STORE)
    p = verbs.add_parser("run", help="run the steps that have not succeeded yet")
    p.add_argument("steps", nargs="*", metavar="STEP", help="names or groups; default: all that run in the foreground")
    p.add_argument("--seconds", type=float, default=540, help="for all of them; default: %(default)s")
    p.add_argument("--again", action="store_true", help="also what succeeded before")
    p.add_argument("--back", type=Path, metavar="FOLDER", help="a second place for the results")
    p.add_argument("--store", type=Path, default=store.STORE)
    p = verbs.add_parser("report", help="print results.jsonl as a table")
    p.add_argument("results", type=Path)
    a = parser.parse_args(argv)
    root, small = Path.cwd(), os.environ.get("GPU_KIT_DEVICE") == "cpu"
    if a.verb in ("prepare", "plan"):
        from . import prepare

        prepare.prepare(root, a.kit, a.preset) if a.verb == "prepare" else None
        print(prepare.commands(Path.cwd(), a.kit, a.back))
    elif a.verb == "receive":
        for name in store.receive(a.part, a.store):
            print(f"{name} is complete")
        print(f"in the store: {', '.join(sorted(store.complete(a.store))) or 'no archive is complete yet'}")
        for words in a.start:
            print(f"{' '.join(words)}: runs in the background, process {runner.start(words, root, a.store, 540)}")
    elif a.verb == "run":
        wanted = steps.chosen(a.steps, steps.all_steps(small))
        if not a.steps:
            runner.stop("warm", a.store)  # measurements want the GPU for themselves
        made = runner.run(wanted, root, a.store, a.seconds, a.back, a.again)
        return int(any(line["status"] != "ok" for line in made))
    else:
        print(runner.report(a.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
