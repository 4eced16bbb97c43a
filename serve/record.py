"""A v2 job as it is on disk, and how a row of the database becomes one."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUEUED, PROCESSING, COMPLETED, FAILED = "QUEUED", "PROCESSING", "COMPLETED", "FAILED"
_LINE = re.compile(r"[ -~]*")  # what a header takes


@dataclass(frozen=True)
class Record:
    """A job as it is on disk. files: of its pictures, made or to be made. created: seconds since 1970. adjusted: what is
    drawn otherwise than asked; on disk it is among the metrics, so that older versions can read the same table."""

    id: str
    status: str
    attempts: int
    client: str
    model: str
    prompt: str
    options: Mapping[str, Any]
    base64: bool
    files: Sequence[str]
    error: str | None
    metrics: Mapping[str, Any]
    created: float
    adjusted: Sequence[str] = ()


def record_of(row: sqlite3.Row) -> Record:
    """One that can't be read is a job that has failed: what is on a disk may be anything."""
    try:
        return _checked(row)
    except (ValueError, TypeError, RecursionError) as error:
        why = f"what the disk has of this job is damaged: {str(error)[:200]}"
        return Record(row["id"], FAILED, 0, "", "", "", {}, False, (), why, {}, 0.0)


def _checked(row: sqlite3.Row) -> Record:
    """ValueError names the column."""
    status, number = row["status"], (int, float)
    kinds = (("client", str), ("model", str), ("prompt", str), ("attempts", int), ("created", number))
    for name, kind in (*kinds, ("error", (str, type(None)))):
        if not isinstance(row[name], kind):
            raise ValueError(f"{name} is {row[name]!r}")
    if status not in (QUEUED, PROCESSING, COMPLETED, FAILED):
        raise ValueError(f"status is {status!r}")
    options, metrics, files = _json(row, "options", dict), _json(row, "metrics", dict), _json(row, "files", list)
    if status != FAILED and not isinstance(options.get("seed"), int):  # one that failed at once has none
        raise ValueError("options have no seed")
    names = [file for file in files if isinstance(file, str) and Path(file).name == file]
    if names != files or (status != FAILED and len(names) != options.get("samples", 1)):
        raise ValueError("files are not the job's pictures")
    adjusted = metrics.pop("adjusted", [])
    if not isinstance(adjusted, list) or not all(isinstance(each, str) and _LINE.fullmatch(each) for each in adjusted):
        raise ValueError("metrics say of adjusted what can't be told")
    return Record(
        row["id"], status, row["attempts"], row["client"], row["model"], row["prompt"], options, bool(row["base64"]),
        files, row["error"], metrics, row["created"], adjusted,
    )  # fmt: skip


def _json(row: sqlite3.Row, name: str, kind: type) -> Any:
    try:
        value = json.loads(row[name])
        json.dumps(value, allow_nan=False)  # it is told as JSON
    except (ValueError, RecursionError):
        raise ValueError(f"{name} are not JSON") from None
    if not isinstance(value, kind):
        raise ValueError(f"{name} are of another kind")
    return value
