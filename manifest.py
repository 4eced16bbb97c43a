"""The manifest `vega-edge.json` of a bundle: what it may say, and nothing else.

It holds what the files that diffusers writes do not: where the model came from, its defaults and limits, and the size
and sha256 of every file. Knows no disk: `bundle.py` reads, compares and writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import records
from .errors import BundleError

MANIFEST = "vega-edge.json"
FORMAT = 1
INDEX = "model_index.json"
AGAIN = "copy or export the bundle again"  # what to do about a damaged one
Dtype = Literal["fp32", "fp16", "bf16", "int8"]
_ATTENTION = ".mha.onnx"
ROOT_PART = "config"  # the part of the files that lie in no subfolder


@dataclass(frozen=True)
class FileEntry:
    sha256: str  # 64 lower-case hex digits
    bytes: int


@dataclass(frozen=True)
class Parameter:
    """Where a torch parameter went in the graph; `transposed`: the initializer holds its transpose."""

    initializer: str
    transposed: bool


@dataclass(frozen=True)
class Part:
    """`max_relative_error` is the largest difference from torch on real inputs that the exporter saw.

    dtype, weights: where they are not the bundle's. activation_scale: what the decoder's or encoder's inner values were
    multiplied by to stay in fp16's range; its results are the same.
    """

    files: Mapping[str, FileEntry]
    max_relative_error: float | None = None
    parameters: Mapping[str, Parameter] | None = None
    dtype: Dtype | None = None
    weights: Dtype | None = None
    activation_scale: float | None = None


@dataclass(frozen=True)
class Lora:
    file: str
    sha256: str
    strength: float


@dataclass(frozen=True)
class Source:
    model: str
    loras: tuple[Lora, ...] = ()
    vae: Literal["full", "tiny"] = "full"  # what vae_decoder is
    random_weights: int | None = None  # the seed, where they are not trained ones


@dataclass(frozen=True)
class _Defaults:
    """What a request is taken to say where it says nothing; sizes in px."""

    scheduler: str | None = None
    family: str | None = None
    schedule: str | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    prompt_syntax: Literal["plain", "a1111"] | None = None


@dataclass(frozen=True)
class _Limits:
    """Least and most that a request may ask for; sizes in px."""

    steps: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    size_px: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Manifest:
    """`dtype` is the arithmetic of the graphs, `weights` how their numbers are stored.

    A part named unet has its files under unet/; the part named config has those of the bundle's root.
    """

    name: str
    created_by: str
    dtype: Dtype
    weights: Dtype
    source: Source
    defaults: Mapping[str, Any]
    limits: Mapping[str, Any]
    parts: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Raises BundleError, with `path` in it, for anything that this version does not know to the last key."""
        try:
            values = _parsed(text)
            _check_format(values)
            del values["format"]
            manifest = records.decode(cls, values)
            _check_options(manifest.defaults, manifest.limits)
            _check_files(manifest)
        except records.RecordError as failure:
            raise BundleError(f"{path}: {failure}") from failure
        return manifest

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **records.encode(self)}, indent=2, allow_nan=False) + "\n"


def _check_options(defaults: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
    """Raises RecordError unless they are what `_Defaults` and `_Limits` say."""
    for cls, name, given in ((_Defaults, "defaults", defaults), (_Limits, "limits", limits)):
        try:
            records.decode(cls, dict(given))
        except records.RecordError as failure:
            raise records.RecordError(f"{name}: {failure}") from failure
    for name, ends in limits.items():
        if len(ends) != 2 or not ends[0] <= ends[1]:
            raise records.RecordError(f"limits: {name} must be [least, most], not {json.dumps(ends)}")


def _parsed(text: str) -> Any:
    try:
        return records.parse(text)
    except records.RecordError as failure:
        raise records.RecordError(f"{failure}; {AGAIN}") from failure


def _check_format(values: Any) -> None:
    """Looks at the format before anything else: what a newer one holds can't be judged here."""
    if not isinstance(values, dict) or "format" not in values:
        raise records.RecordError(f"not a manifest of vega-edge: it has no 'format'; {AGAIN}")
    got = values["format"]
    if type(got) is not int or got < 1:
        raise records.RecordError(f"format must be a whole number from 1, not {json.dumps(got)}")
    if got > FORMAT:
        raise records.RecordError(f"made by a newer vega-edge (format {got}, this one reads up to {FORMAT}): upgrade")


def _check_files(manifest: Manifest) -> None:
    for part, entry in manifest.parts.items():
        for file, described in entry.files.items():
            if not _is_inside(file):
                raise records.RecordError(f"parts.{part}: {file!r} is not the name of a file inside the bundle")
            # A file under its own part's folder can't be listed by two parts.
            if part_of(file) != part:
                raise records.RecordError(f"parts.{part}: {file!r} belongs to part {part_of(file)!r}")
            if len(described.sha256) != 64 or set(described.sha256) - set("0123456789abcdef"):
                raise records.RecordError(f"parts.{part}: the sha256 of {file!r} must be 64 lower-case hex digits")
    if INDEX not in manifest.parts.get(ROOT_PART, Part({})).files:
        raise records.RecordError(f"parts.{ROOT_PART}: {INDEX} is not listed")


def _is_inside(file: str) -> bool:
    """Plain and relative on every system: no .., leading /, drive or backslash; nor can the manifest list itself."""
    pieces = file.split("/")
    return file != MANIFEST and not any(p in ("", ".", "..") or set(p) & set("\\:\0") for p in pieces)


def part_of(file: str) -> str:
    folder, slash, _ = file.partition("/")
    return folder if slash else ROOT_PART


def attention_form(file: str) -> str:
    """Return the name of the second graph of `file`, for onnxruntime: 'unet/model.mha.onnx'. See `export/attention.py`."""
    return file.removesuffix(".onnx") + _ATTENTION


def plain_form(file: str) -> str:
    """The name of the graph that every engine takes: the other way round."""
    return file.replace(_ATTENTION, ".onnx")
