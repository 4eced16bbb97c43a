"""Reading safetensors files in numpy: their header, and their tensors (bfloat16 too, which numpy itself lacks).

The format: eight bytes little-endian length, that many bytes of JSON (name -> dtype, shape, offsets), then the data.
https://github.com/huggingface/safetensors#format. Knows no torch, so that LoRA files can be read where it is missing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """One tensor of a file: its dtype as the format spells it, its shape, and its bytes' place after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The names, dtypes and shapes a file holds, without its weights. CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch it again")
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(_LONGEST_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
                raise CheckpointError(f"{path} is no safetensors file, or only its beginning; fetch it again")
            raw = file.read(length)
    except OSError as failure:
        raise CheckpointError(f"{path} can't be read: {failure.strerror or failure}") from failure
    try:
        parsed: dict[str, Any] = json.loads(raw)
        metadata = {_text(k): _text(v) for k, v in parsed.pop("__metadata__", {}).items()}
        entries = {
            k: Entry(_text(v["dtype"]), _whole(v["shape"]), *_whole(v["data_offsets"])) for k, v in parsed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file, or its header is damaged; fetch it again") from None
    data_start = _LENGTH_BYTES + length
    wanted_bytes = data_start + max((e.end for e in entries.values()), default=0)
    if wanted_bytes != size_bytes:
        raise CheckpointError(f"{path} has {size_bytes} bytes, its header says {wanted_bytes}; fetch it again")
    return Header(entries, metadata, data_start)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _whole(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(values)
    return tuple(values)


def read_float32(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Every tensor of the file as float32, and the file's metadata. Meant for LoRA files, not for whole models."""
    header = read_header(path)
    data = np.memmap(path, np.uint8, "r", offset=header.data_start) if header.entries else np.zeros(0, np.uint8)
    return {
        name: _as_float32(path, name, e, data[e.start : e.end]) for name, e in header.entries.items()
    }, header.metadata


def _as_float32(path: Path, name: str, entry: Entry, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    if entry.dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is stored as {entry.dtype}; allowed: {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[entry.dtype]).newbyteorder("<")
    if data.size != math.prod(entry.shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {name} has {data.size} bytes, which are not {entry.shape} of {entry.dtype}")
    values: NDArray[Any] = np.frombuffer(data.tobytes(), dtype)
    if entry.dtype == "BF16":  # bfloat16 is the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)  # in one dimension: numpy 1.26 views no scalar so
    return values.astype(np.float32, copy=False).reshape(entry.shape)
