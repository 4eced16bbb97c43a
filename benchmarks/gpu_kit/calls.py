"""The commands to run on the GPU machine, in order, each with its time limit and the folders it carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import pack, wheels

KIT = "python3 -m benchmarks.gpu_kit"
START_S, CALL_S = 75, 14  # estimates: the machine's start, and the transfer of one full upload
RUN_S, AGAIN_S = 360, 300  # of the first command that measures, and of one for what is left or failed


class Call(NamedTuple):
    """`limit`: seconds after which the command is to be ended; `expected`: seconds it should take, the upload included."""

    command: str
    limit: int
    carry: tuple[str, ...]
    expected: int


def calls(manifest: Mapping[str, Any], kit: str, back: str) -> list[Call]:
    """`kit`: the prepared folder, below the working tree. `back`: where the machine leaves results, in its shell's words."""
    results = f' --back "{back}"' if back else ""
    last = min(piece["part"] for piece in manifest["archives"][wheels.LAST]["pieces"])
    made = []
    for number in range(1, manifest["parts"] + 1):
        part = pack.part_folder(Path(kit), number).as_posix()
        command, limit, expected = f"{KIT} receive {part}", 120, CALL_S + 3
        if number == 1:
            command, expected = f"{command} --start miniature exports --start warm", expected + START_S
        if number == last - 1:  # everything but the last archive is there
            command, limit = f"{command} && {KIT} run --seconds {RUN_S}{results}", RUN_S + 120
            made += [Call(command, limit, (part,), expected + RUN_S + 10)]
            made += [Call(f"{KIT} run --seconds {AGAIN_S}{results}", AGAIN_S + 60, (), 0)]
            continue
        if number == manifest["parts"]:
            command, limit, expected = f"{command} && {KIT} run rtx --seconds 180{results}", 300, expected + 60
        made.append(Call(command, limit, (part,), expected))
    return made


def told(made: list[Call]) -> str:
    """The calls for people."""
    lines = []
    for number, call in enumerate(made, 1):
        carried = f"carries {', '.join(call.carry)}" if call.carry else "carries nothing"
        note = "" if call.expected else ", if time is left: what was left out or failed"
        lines += [f"{number}. limit {call.limit} s, {carried}{note}", f"   {call.command}"]
    total = sum(call.expected for call in made)
    uploads = sum(bool(call.carry) for call in made)
    lines.append(
        f"{len(made)} commands with {uploads} uploads; about {total / 60:.0f} minutes without repeats; run them one right after the other"
    )
    return "\n".join(lines)
