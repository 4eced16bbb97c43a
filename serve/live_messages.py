"""What the live page and the server say to each other; docs/serve.md describes it for other clients.

Text messages are JSON objects with a "type"; a picture is one binary message: four bytes of length (big endian), that
much JSON, then the file.

    to us    hello (key)                          first, where the server asks for keys
             draw (id, prompt, and the fields of the API; slot a|b, previews off|auto|on, format jpeg|webp)
             stop (slot)
             ping
    from us  ready (models, schedulers)           after hello, or at once
             waiting (id, slot, ahead)            others are being drawn for; ahead: other pages that wait
             started (id, slot)                   after waiting
             preview, picture                     binary; id, slot, index, total, seed, seconds, parameters, adjusted
             error (id, slot, error)              retry_s, where the same will be drawn after so long
             pong
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocketDisconnect

from .. import __version__
from ..errors import UsageError
from ..runtime.schedulers import all_schedulers
from .catalog import Entry
from .job import Done, Overloaded

SLOTS = ("a", "b")


def parse(received: Any) -> dict[str, Any]:
    """A JSON object. UsageError for anything else, WebSocketDisconnect at the end."""
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1006))
    text = received.get("text")
    if text is None:
        raise UsageError("messages must be text, got bytes")
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UsageError("the message is not JSON") from None
    if not isinstance(message, dict):
        raise UsageError("the message must be a JSON object with a type")
    return message


def one_of(message: dict[str, Any], name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
    value = message.get(name, default or allowed[0])
    if value not in allowed:
        raise UsageError(f"{name}: must be one of {', '.join(allowed)}, got {str(value)[:40]!r}")
    return str(value)


def number(message: dict[str, Any]) -> int | None:
    value = message.get("id")
    return value if isinstance(value, int) and abs(value) < 2**53 else None


def ready(entries: list[Entry], slugs: Mapping[str, str]) -> dict[str, Any]:
    """slugs: every name that is known here, and the name of the model that it means."""
    models = [
        {
            "name": e.slug, "title": e.recipe.title, "parameters": e.parameters,
            "slugs": sorted(slug for slug, name in slugs.items() if name == e.slug != slug),
        }
        for e in entries
    ]  # fmt: skip
    schedulers = list(dict.fromkeys(row.name for row in all_schedulers()))
    return {"type": "ready", "version": __version__, "models": models, "schedulers": schedulers}


def picture(facts: dict[str, Any], done: Done, media: str) -> dict[str, Any]:
    request = done.request
    return {
        "type": "picture", **facts, "seed": request.seed, "media": media, "width": request.width,
        "height": request.height, "steps": request.steps, "scheduler": request.scheduler,
        "seconds": {k: round(v, 4) for k, v in done.seconds.items()},
        "parameters": request.parameters(done.model, __version__), "adjusted": done.cut_off,
    }  # fmt: skip


def fault(message: dict[str, Any], error: Exception) -> dict[str, Any]:
    """To a message that was wrong, or that must wait: `retry_s` says for how long."""
    slot = message.get("slot", SLOTS[0])
    found = {"type": "error", "id": number(message), "slot": slot if slot in SLOTS else SLOTS[0], "error": str(error)}
    return {**found, "retry_s": round(error.retry_s, 1)} if isinstance(error, Overloaded) else found


def binary(head: dict[str, Any], file: bytes) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + text + file


def _no_constant(name: str) -> Any:
    raise ValueError(name)
