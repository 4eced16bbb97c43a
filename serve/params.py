"""A request's body to what a pipeline is asked: numbers in quotes, unknown fields and old names are understood."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import UsageError
from ..runtime import names
from ..runtime.rng import MAX_SEED
from .catalog import Entry, Schema, own_parameters

# The API's names and those of `Pipeline.request`.
_OPTIONS = {
    "negative_prompt": "negative", "num_inference_steps": "steps", "guidance_scale": "guidance", "samples": "samples",
    "scheduler": "scheduler", "seed": "seed", "img_width": "width", "img_height": "height",
}  # fmt: skip
# Sent by official clients though no page lists them (segmind-py, segmind-npm).
_OLD_SCHEDULERS = {"dpmpp_2m", "dmpp_2m", "dpmpp_sde_ancestral"}
_SIDES, _SIDE_MULTIPLE = ("img_width", "img_height"), 64
_LARGEST = 1e18  # beyond any field's range, and well inside a float's


class BadBody(UsageError):
    """status: 400, or 406 for a content type that is not understood."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """options: of `Pipeline.request`, the seed chosen. adjusted: what a stand-in does otherwise than asked."""

    prompt: str
    options: Mapping[str, Any]
    base64: bool
    adjusted: tuple[str, ...] = ()


async def parse_body(body: bytes, content_type: str) -> dict[str, Any]:
    """JSON, or a multipart form of texts. BadBody for anything else."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(body, content_type)
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadBody(f"Invalid content type {kind or 'none'!r}; send application/json", 406)
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise BadBody("the body is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError and digits without end are ValueErrors too
        raise BadBody(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadBody(f"the body must be a JSON object with a prompt, got {_kind(value)}")
    return value


def read(body: Mapping[str, Any], entry: Entry, limits: str, prompt_chars: int) -> Asked:
    """limits "segmind": the page's ranges and lists; "local": what the model can do. UsageError names the field."""
    given = {name: body[name] for name in entry.parameters if body.get(name) is not None}
    prompt = _text("prompt", given.pop("prompt", None), prompt_chars)
    base64 = _boolean(given.pop("base64", False))
    local = own_parameters(entry.recipe)
    adjusted: list[str] = []
    options: dict[str, Any] = {}
    for name, schema in entry.parameters.items():
        if name not in _OPTIONS:
            continue
        value = given.get(name, None if entry.stand_in else schema.get("default"))
        if value is None:
            continue
        value = _value(name, value, schema["type"], prompt_chars)
        if name in entry.own:
            if value != schema["default"]:
                adjusted.append(f"{name}={schema['default']}")
            continue
        if entry.stand_in:
            value = value if name in _SIDES else _nearest(name, value, local[name], adjusted)
        else:
            _check(name, value, schema if limits == "segmind" or not entry.has_page else local.get(name, {}), limits)
        options[_OPTIONS[name]] = value
    if entry.stand_in:
        _fit_sides(options, local, adjusted)
    return Asked(prompt, {**options, "seed": _seed(options)}, base64, tuple(adjusted))


def _seed(options: Mapping[str, Any]) -> int:
    """Chosen here, so that a job that is drawn again after a restart becomes the same picture."""
    seed = int(options.get("seed", -1))
    return secrets.randbelow(2**32) if seed == -1 else min(seed, MAX_SEED - int(options.get("samples", 1)) + 1)


def _value(name: str, got: Any, kind: str, prompt_chars: int) -> Any:
    if kind == "string":
        return _text(name, got, prompt_chars)
    if isinstance(got, str):
        got = _number_in(name, got)
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise UsageError(f"{name}: must be a number, got {_kind(got)}")
    if abs(got) > _LARGEST or not math.isfinite(got):
        raise UsageError(f"{name}: must be a number of a sensible size, got {_short(got)}")
    if kind == "number":
        return float(got)
    if got != int(got):
        raise UsageError(f"{name}: must be a whole number, got {got!r}")
    return int(got)


def _number_in(name: str, got: str) -> float | int:
    """Old helper libraries send "9" and "1024"."""
    text = got.strip()
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise UsageError(f"{name}: must be a number, got {_short(got)}") from None


def _check(name: str, value: Any, schema: Mapping[str, Any], limits: str) -> None:
    low, high, listed = schema.get("minimum"), schema.get("maximum"), schema.get("enum")
    if name == "scheduler" and listed is not None:
        known = {names.key(each) for each in (*listed, *_OLD_SCHEDULERS)}
        if names.key(value) not in known:
            raise UsageError(f"scheduler: {_short(value)} is not one of {', '.join(listed)}")
        return
    hint = "; --limits local allows what the model can do" if limits == "segmind" else ""
    if listed is not None and value not in listed:
        raise UsageError(f"{name}: must be one of {', '.join(map(str, listed))}, got {value}{hint}")
    if (low is not None and value < low) or (high is not None and value > high):
        above = f"at least {low:g}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}: must be {above}, got {_short(value)}{hint}")


def _nearest(name: str, value: Any, schema: Mapping[str, Any], adjusted: list[str]) -> Any:
    """What a stand-in can do that is nearest to what was asked."""
    if "minimum" not in schema or name == "seed":
        _check(name, value, schema, "local")
        return value
    near = min(max(value, schema["minimum"]), schema["maximum"])
    if near != value:
        adjusted.append(f"{name}={near:g}")
    return near


def _fit_sides(options: dict[str, Any], local: Schema, adjusted: list[str]) -> None:
    """A picture larger than a stand-in can draw becomes one of about the same shape, its longer side the one that the
    stand-in draws best."""
    given = {name: options[_OPTIONS[name]] for name in _SIDES if _OPTIONS[name] in options}
    longest = max(given.values(), default=0)
    scale = local["img_width"]["default"] / longest if longest > local["img_width"]["maximum"] else 1
    for name, value in given.items():
        least = local[name]["minimum"]
        near = max(round(value * scale) // _SIDE_MULTIPLE * _SIDE_MULTIPLE, least)
        if near != value:
            adjusted.append(f"{name}={near}")
        options[_OPTIONS[name]] = near


def _text(name: str, got: Any, most: int) -> str:
    if not isinstance(got, str):
        raise UsageError(f"{name}: must be text, got {_kind(got)}")
    if len(got) > most:
        raise UsageError(f"{name}: must be at most {most} characters, got {len(got)}")
    return re.sub("[\ud800-\udfff]", "\ufffd", got)  # half a surrogate pair, which no database and no file takes


def _boolean(got: Any) -> bool:
    if isinstance(got, str) and got.strip().lower() in ("true", "1", "yes", "false", "0", "no", ""):
        return got.strip().lower() in ("true", "1", "yes")
    if got in (True, False):
        return bool(got)
    raise UsageError(f"base64: must be true or false, got {_kind(got)}")


async def _form(body: bytes, content_type: str) -> dict[str, Any]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            Headers({"content-type": content_type}), whole(), max_files=4, max_fields=64
        ).parse()
    except (MultiPartException, FormParserError, ValueError):  # ValueError: of an odd charset
        raise BadBody("the body is not the form that its content type says") from None
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    await form.close()
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _kind(value: Any) -> str:
    kinds = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return kinds.get(type(value), "an object")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
