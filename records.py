"""Strict JSON for frozen dataclasses: what the type does not name is refused, and the text says what it does name.

Knows nothing of bundles or models. A field may be str, int, float, bool, Any, a Literal of texts, a dataclass,
`Mapping[str, X]`, `tuple[X, ...]` or `X | None`, which is X or left out. A field with a default may be left out; every
other must be there.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Decoder = Callable[[Any, str], Any]  # (JSON value, where it stands) -> value


class RecordError(ValueError):
    """A JSON text does not fit the type; its one line begins with the place: 'parts.unet: unknown key ...'."""


def parse(text: str) -> Any:
    """JSON text to Python values; a key given twice and NaN or Infinity are refused (json lets both pass)."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecordError:
        raise
    except (ValueError, RecursionError) as failure:
        raise RecordError(f"not JSON: {failure}") from failure


def decode(cls: type[T], value: object) -> T:
    """A parsed JSON value to `cls`, a dataclass. Raises RecordError."""
    return cast(T, _decoder(cls)(value, ""))


def encode(record: Any) -> Any:
    """A dataclass to JSON values, fields in their order. A field that is None is left out."""
    if dataclasses.is_dataclass(record):
        fields = ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))
        return {name: encode(value) for name, value in fields if value is not None}
    if isinstance(record, Mapping):
        return {key: encode(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [encode(item) for item in record]
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"key {twice!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise RecordError(f"{name} is not allowed as a number")


def _fail(where: str, text: str) -> RecordError:
    return RecordError(f"{where}: {text}" if where else text)


def _below(where: str, key: str) -> str:
    """The place of `key` in `where`: parts.unet, parts.unet.files['unet/model.onnx']."""
    if not key.isidentifier():
        return f"{where}[{key!r}]"
    return f"{where}.{key}" if where else key


def _decoder(kind: Any) -> Decoder:
    """Built once for a type and then applied to every value of it: resolving type hints for each value is slow."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, where: value
    if dataclasses.is_dataclass(kind):
        return _record_decoder(cast(type, kind))
    if origin is Literal:
        return _choice_decoder(args)
    if origin is Union or origin is types.UnionType:
        (inner,) = (_decoder(arg) for arg in args if arg is not type(None))
        return inner  # None is what a field holds that was left out; null is not a value
    if origin is tuple:
        return _list_decoder(_decoder(args[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_decoder(_decoder(args[1]))
    return _scalar_decoder(kind)


def _record_decoder(cls: type) -> Decoder:
    hints = get_type_hints(cls)
    decoders = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(cls)}
    missing = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]

    def decode_record(value: Any, where: str) -> Any:
        _expect(value, dict, "an object", where)
        for key in value:
            if key not in decoders:
                raise _fail(where, f"unknown key {key!r}; known keys: {', '.join(decoders)}")
        for key in needed:
            if key not in value:
                raise _fail(where, f"key {key!r} is missing; needed keys: {', '.join(needed)}")
        return cls(**{key: decoders[key](item, _below(where, key)) for key, item in value.items()})

    return decode_record


def _mapping_decoder(item: Decoder) -> Decoder:
    def decode_mapping(value: Any, where: str) -> dict[str, Any]:
        _expect(value, dict, "an object", where)
        return {key: item(inner, _below(where, key)) for key, inner in value.items()}

    return decode_mapping


def _list_decoder(item: Decoder) -> Decoder:
    def decode_list(value: Any, where: str) -> tuple[Any, ...]:
        _expect(value, list, "a list", where)
        return tuple(item(inner, f"{where}[{index}]") for index, inner in enumerate(value))

    return decode_list


def _choice_decoder(allowed: tuple[Any, ...]) -> Decoder:
    def decode_choice(value: Any, where: str) -> Any:
        if value not in allowed:
            raise _fail(where, f"must be one of {', '.join(map(json.dumps, allowed))}, not {json.dumps(value)}")
        return value

    return decode_choice


def _scalar_decoder(kind: type) -> Decoder:
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    word = words[kind]  # a KeyError here is a field type that this file does not know

    def decode_scalar(value: Any, where: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        _expect(value, kind, word, where)
        return value

    return decode_scalar


def _expect(value: Any, kind: type, word: str, where: str) -> None:
    if type(value) is not kind:  # not isinstance: a bool is an int in Python
        shown = json.dumps(value)
        raise _fail(where, f"must be {word}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")
