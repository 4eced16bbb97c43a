"""An exported model on disk: a folder in the diffusers/optimum ONNX layout, plus our manifest `vega-edge.json`.

A folder without a manifest, as optimum exports it, opens too, unchecked. Knows no engine and no diffusion: what is in
the configs is for others to understand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BundleError
from .known_hashes import known_sha256
from .manifest import AGAIN, INDEX, MANIFEST, ROOT_PART, FileEntry, Lora, Manifest, Parameter, Part, Source, part_of
from .whole_file import sha256_of, writing

__all__ = ["Bundle", "FileEntry", "Lora", "Manifest", "Parameter", "Part", "Source"]
__all__ += ["check_files", "describe_files", "write_manifest"]
_LARGEST = 1 << 16  # of a configuration's whole numbers: sixteen times the widest layer of any model
_MOST_LEVELS = 8
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Bundle:
    """`manifest` is None for a folder that another tool exported. `path` is absolute: a program may change its folder."""

    path: Path
    manifest: Manifest | None
    model_index: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Reads the manifest and checks the files, large ones only where they are not known to be unchanged since (see
        `known_hashes`); `verify=False` checks that they are there and their sizes only.

        Raises BundleError that names the part whose file is missing, truncated or altered.
        """
        path = Path(path)
        _check_folder(path)
        path = path.absolute()
        manifest = None
        if (path / MANIFEST).exists():
            manifest = Manifest.from_json(_read_text(path / MANIFEST), path / MANIFEST)
            check_files(path, manifest, known_sha256 if verify else None)
        elif not (path / INDEX).is_file():
            raise BundleError(f"{path} is not a bundle: it has no {INDEX}; make one: vega-edge export MODEL -o BUNDLE")
        elif not any(path.glob("*/*.onnx")):
            raise BundleError(f"{path} has no ONNX graphs; export it first: vega-edge export {path} -o BUNDLE")
        return cls(path, manifest, _read_object(path / INDEX))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the subfolders that hold the model: unet, tokenizer, ..."""
        if self.manifest is not None:
            return tuple(sorted(part for part in self.manifest.parts if part != ROOT_PART))
        # model_index.json also names parts that the folder lacks, and facts that are no parts.
        return tuple(sorted(part for part in self.model_index if (self.path / part).is_dir()))

    @property
    def precision(self) -> tuple[str, str]:
        """(dtype, weights) as the manifest says; ('', '') where there is none."""
        return (self.manifest.dtype, self.manifest.weights) if self.manifest else ("", "")

    @property
    def sdxl(self) -> bool:
        """Whether the model is of the SDXL kind, with two text encoders, rather than of the SD kind."""
        return "text_encoder_2" in self.model_index

    def has(self, file: str) -> bool:
        """Is `file`, such as "vae_decoder/pixels.onnx", part of the bundle?"""
        if self.manifest is not None:
            return file in self.manifest.parts.get(part_of(file), Part({})).files
        return (self.path / file).is_file()

    def file(self, file: str) -> Path:
        """Raises BundleError if the bundle has no such file; one that its manifest does not list was never checked."""
        if not self.has(file):
            raise BundleError(f"bundle {self.path} has no {file}; it has the parts: {', '.join(self.parts) or 'none'}")
        return self.path / file

    def graph(self, part: str, name: str = "model.onnx") -> Path:
        return self.file(f"{part}/{name}")

    def config(self, part: str) -> dict[str, Any]:
        """The part's config.json as diffusers or transformers wrote it, read anew on each call."""
        return _read_object(self.file(f"{part}/config.json"))

    def number(self, part: str, key: str, most: int = _LARGEST) -> int:
        """Return a whole number from 1 to `most` of the part's configuration. BundleError if it has none, or another value."""
        value = self.config(part).get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise self.misconfigured(part, key, value, f"a whole number from 1 to {most}")
        return value

    def levels(self, part: str) -> int:
        """How many resolutions a network or an autoencoder works at, each half the one before: its list of channels
        has one entry for each. Raises BundleError if there is no such list."""
        config = self.config(part)
        key = next((k for k in ("block_out_channels", "decoder_block_out_channels") if config.get(k) is not None), "")
        channels = config.get(key)
        if not isinstance(channels, list) or not 1 <= len(channels) <= _MOST_LEVELS:
            wanted = f"a list of 1 to {_MOST_LEVELS} numbers, one a level"
            raise self.misconfigured(part, key or "block_out_channels", channels, wanted)
        return len(channels)

    def misconfigured(self, part: str, key: str, got: Any, wanted: str, file: str = "") -> BundleError:
        """Return the error for a value of a configuration that can't be used. `file`: the part's config.json, if not given."""
        text = json.dumps(got)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        said = "has no" if got is None else f"has {shown} for"
        return _damaged(self.path, part, f"{file or f'{part}/config.json'} {said} {key}, which must be {wanted}")

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return _read_object(self.file("scheduler/scheduler_config.json"))


def describe_files(folder: Path, part: str) -> dict[str, FileEntry]:
    """Size and sha256 of every file of `part` in a bundle that is being made, by its name in the bundle, sorted."""
    files = (file for file in _files(folder) if file != MANIFEST and part_of(file) == part)
    return {file: FileEntry(_sha256(folder / file), (folder / file).stat().st_size) for file in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest at once or not at all. Raises BundleError unless it lists exactly the files in `folder`."""
    target = folder / MANIFEST
    text = manifest.to_json()
    Manifest.from_json(text, target)  # what is written can be read
    check_files(folder, manifest, None)
    listed = {file for part in manifest.parts.values() for file in part.files}
    if unlisted := [file for file in _files(folder) if file not in listed | {MANIFEST}]:
        raise BundleError(f"{folder}: the manifest does not list {', '.join(unlisted)}")
    try:
        with writing(target) as stream:
            stream.write(text.encode())
    except OSError as failure:
        raise BundleError(f"{target} can't be written: {failure.strerror}") from failure


def check_files(folder: Path, manifest: Manifest, hash_of: Callable[[Path], str] | None = sha256_of) -> None:
    """Compares the files with the manifest: all sizes first, which costs nothing, then their contents by `hash_of`."""
    entries = [(part, *item) for part, entry in sorted(manifest.parts.items()) for item in entry.files.items()]
    for part, file, entry in entries:
        if fault := _size_fault(folder / file, entry):
            raise _damaged(folder, part, f"{file} {fault}")
    if hash_of is None:
        return
    for part, file, entry in entries:
        got, listed = _sha256(folder / file, hash_of), entry.sha256
        if got != listed:
            raise _damaged(folder, part, f"{file} is altered (sha256 {got[:12]}, the manifest says {listed[:12]})")


def _size_fault(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"is truncated ({size} of {entry.bytes} bytes)"
    return f"is altered ({size} bytes, the manifest says {entry.bytes})" if size > entry.bytes else ""


def _damaged(folder: Path, part: str, fault: str) -> BundleError:
    return BundleError(f"bundle {folder}, part {part}: {fault}; {AGAIN}")


def _check_folder(path: Path) -> None:
    if os.path.isdir(path):  # os.path answers False where Path raises: a name that is too long, a NUL in it
        return
    if not os.path.exists(path):
        raise BundleError(
            f"there is no bundle at {path}; check the path, or make one: vega-edge export MODEL -o BUNDLE"
        )
    raise BundleError(f"{path} is a file; a bundle is a folder, made by: vega-edge export MODEL -o BUNDLE")


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below `folder`, with / between their pieces, sorted."""
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path, hash_of: Callable[[Path], str] = sha256_of) -> str:
    try:
        return hash_of(path)
    except OSError as failure:
        raise BundleError(f"{path} can't be read: {failure.strerror}") from failure


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as failure:
        raise BundleError(f"{path} can't be read: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        raise BundleError(f"{path}: not UTF-8 text; {AGAIN}") from failure


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file of diffusers'; any keys, but it must be an object."""
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as failure:
        raise BundleError(f"{path}: not JSON: {failure}; {AGAIN}") from failure
    if not isinstance(values, dict):
        raise BundleError(f"{path}: must hold an object, not {json.dumps(values)[:40]}; {AGAIN}")
    return values
