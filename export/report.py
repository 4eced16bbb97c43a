"""What an export tells: its progress while it runs, and a table at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Progress(NamedTuple):
    """Phase `index` (from 1) of `total` begins: 'unet', 'trace'."""

    part: str
    phase: str
    index: int
    total: int


@dataclass(frozen=True)
class PartReport:
    """One exported part. `dtype` is that of its arithmetic, which may be fp32 in an fp16 export (see the notes).

    weights: how its numbers
    are stored. max_relative_error: of any output on real inputs, relative to the output's largest value. pixel_levels: of the
    decoder, the largest difference of its uint8 pixels from diffusers'.
    """

    name: str
    dtype: str
    bytes: int
    seconds: float
    max_relative_error: float
    tolerance: float
    pixel_levels: int | None = None
    weights: str = ""


@dataclass(frozen=True)
class ExportReport:
    path: Path
    parts: tuple[PartReport, ...]
    bytes: int  # the whole bundle
    seconds: float
    notes: tuple[str, ...]  # what was decided on the way, one line each


def format_report(report: ExportReport) -> str:
    """The table shown when an export ends, with the notes below it; no final newline."""
    rows = [("part", "dtype, weights", "size", "time", "largest difference from torch (allowed)")]
    for part in report.parts:
        error = f"{part.max_relative_error:.1e} ({part.tolerance:.0e})"
        error += "" if part.pixel_levels is None else f", pixels {part.pixel_levels} of 255"
        rows.append((part.name, f"{part.dtype}, {part.weights}", megabytes(part.bytes), f"{part.seconds:.1f} s", error))
    rows.append(("whole bundle", "", megabytes(report.bytes), f"{report.seconds:.1f} s", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}  {r[4]}".rstrip()
        for r in rows
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def megabytes(count: int) -> str:
    """In units of 10^6 bytes, as disks and download pages count: '12.3 MB'."""
    return f"{count / 1e6:.1f} MB"
