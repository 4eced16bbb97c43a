"""Where an ONNX file keeps its weights: name -> dtype, shape, and the bytes' place in the graph or in the file beside it.

Reads the few fields it needs of the protobuf messages ModelProto, GraphProto and TensorProto (onnx/onnx.proto; wire
format: protobuf.dev/programming-guides/encoding), because the onnx package would be a dependency of tens of megabytes
for these. Knows no engine and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError

# TensorProto.DataType. numpy has no bfloat16: its bits are uint16 here.
_STORED = {1: "fp32", 10: "fp16", 16: "bf16"}
_NUMPY: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Weight(NamedTuple):
    """One initializer. `dtype`: "fp32", "fp16" or "bf16", or ONNX's number for another; `external`: not in the graph;
    `length`: in bytes, 0 where an external one's is not said."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    external: bool
    length: int = 0

    def read(self) -> NDArray[np.float32]:
        """Its values; BundleError where they are not stored as numbers that a LoRA could be added to."""
        if self.dtype not in _NUMPY:
            raise BundleError(f"{self.file}: a weight of ONNX data type {self.dtype} can't be read as numbers")
        kind = _NUMPY[self.dtype]
        count = int(np.prod(self.shape))
        stored: NDArray[Any] = np.fromfile(self.file, kind, count, offset=self.offset)
        if stored.size != count:
            raise BundleError(f"{self.file} is truncated; copy or export the bundle again")
        return from_stored(stored.reshape(self.shape))


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Of a weight that is "fp32", "fp16" or "bf16"; void for any other, which no array has."""
    return _NUMPY.get(dtype, np.dtype("V"))


def from_stored(stored: NDArray[Any]) -> NDArray[np.float32]:
    """float32 of float32, float16, or uint16 that holds the bits of bfloat16 (the upper half of a float32)."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def to_stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`values` rounded to the nearest, half to even, of "fp32", "fp16" or "bf16"; too large a value becomes infinite."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = np.ascontiguousarray(values, _NUMPY[dtype])
    return stored


def read_weights(path: Path) -> dict[str, Weight]:
    """Every initializer of the graph at `path` whose bytes can be found, by name. BundleError if it is no ONNX file."""
    data = memoryview(path.read_bytes())
    try:
        graphs = [place for number, place in _fields(data, (0, len(data))) if number == _MODEL_GRAPH]
        tensors = (place for graph in graphs for number, place in _fields(data, graph) if number == _GRAPH_INITIALIZER)
        named = [_tensor(data, place, path) for place in tensors]
    except (IndexError, ValueError, TypeError) as failure:
        raise BundleError(f"{path} is no ONNX graph, or is damaged; copy or export the bundle again") from failure
    return {name: weight for name, weight in named if weight is not None}


def _tensor(data: memoryview, place: Any, path: Path) -> tuple[str, Weight | None]:
    name, dims, kind, raw = "", list[int](), 0, None
    external: dict[str, str] = {}
    for number, value in _fields(data, place):
        if number == _DIMS:  # one by one as onnx writes them, or packed
            dims += [value] if isinstance(value, int) else _varints(data, value)
        elif number == _DATA_TYPE:
            kind = value
        elif number == _NAME:
            name = _text(data, value)
        elif number == _RAW_DATA:
            raw = value
        elif number == _EXTERNAL_DATA:
            entry = dict(_fields(data, value))
            external[_text(data, entry[_ENTRY_KEY])] = _text(data, entry[_ENTRY_VALUE])
    dtype = _STORED.get(kind, str(kind))
    if "location" in external:
        if not _is_inside(external["location"]):
            raise BundleError(
                f"{path} keeps weights in {external['location']!r}, which is not in its folder; it is not opened"
            )
        beside, offset = path.parent / external["location"], int(external.get("offset", "0"))
        return name, Weight(dtype, tuple(dims), beside, offset, external=True, length=int(external.get("length", "0")))
    return name, None if raw is None else Weight(
        dtype, tuple(dims), path, raw[0], external=False, length=raw[1] - raw[0]
    )


def _is_inside(location: str) -> bool:
    """As onnx/docs/ExternalData.md asks: relative, and without a way up, on every system."""
    return not any(piece in ("", "..") or ":" in piece for piece in location.replace("\\", "/").split("/"))


def _fields(data: memoryview, place: tuple[int, int]) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: an int, or for texts, bytes and messages their (start, end) in `data`."""
    at, end = place
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                raise ValueError("longer than what holds it")
            yield number, (at, at + length)
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(data: memoryview, place: tuple[int, int]) -> list[int]:
    found, (at, end) = [], place
    while at < end:
        value, at = _varint(data, at)
        found.append(value)
    return found


def _text(data: memoryview, place: tuple[int, int]) -> str:
    return bytes(data[slice(*place)]).decode()
