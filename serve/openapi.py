"""The description of the API: FastAPI's, with a path of its own for every slug and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .catalog import Entry, own_parameters
from .service import Service
from .settings import CREDITS, HOLD_S, MOST_HOLD_S

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}


def describe(app: FastAPI, service: Service) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for slug, entry in sorted(service.entries.items()):
        limits = service.settings.limits
        found["paths"][f"/v1/{slug}"] = {"post": _operation(entry, limits, "A picture, while you wait", _SYNC, "v1")}
        found["paths"][f"/v2/{slug}"] = {"post": _operation(entry, limits, "A job for the queue", _QUEUED, "v2")}
    if service.keys:
        found.setdefault("components", {})["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}
        }
        found["security"] = [{"key": []}]
    return found


def _operation(entry: Entry, limits: str, summary: str, answer: dict[str, Any], tag: str) -> dict[str, Any]:
    own = own_parameters(entry.recipe)
    strict = limits == "segmind" and entry.has_page
    properties = {
        name: dict(schema) if strict else {**_without_range(schema), **({} if entry.stand_in else _range(own[name]))}
        for name, schema in entry.parameters.items()
    }
    schema = {"type": "object", "required": ["prompt"], "properties": properties}
    codes = {"400": "A parameter or the body is wrong", "401": "A key is needed, or it is not known", "403": "Another web page asked", "404": "The model is not here", "406": "The content type",
             "408": "The body came too slowly", "413": "The body is too long", "422": "It took too long, or a job has failed",
             "429": "The queue is full, or too many requests", "500": "Drawing failed", "503": "Shutting down; for a v2 job also where another server takes the jobs of this folder"}  # fmt: skip
    errors = {
        code: {"description": text, "content": {"application/json": {"schema": _ERROR}}} for code, text in codes.items()
    }
    return {
        "summary": summary if entry.ready else f"Not here; {entry.recipe.cure}",
        "operationId": f"{tag} {entry.slug}",
        "tags": [tag],
        "description": f"Drawn by {entry.recipe.name}: {entry.recipe.title}.",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema, "example": dict(entry.example)}},
        },
        "responses": {"200": answer, **errors},
    }


_RANGE = ("minimum", "maximum", "enum")


def _without_range(schema: Any) -> dict[str, Any]:
    """The page's ranges are those of the cloud. Of what a stand-in is asked for, it does the nearest that it can."""
    return {key: value for key, value in schema.items() if key not in _RANGE}


def _range(schema: Any) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key in _RANGE}


def answers(example: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Those to a question about a job, the good one as in the example."""

    def told(description: str, example: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
        schema = {"type": "object", "required": required}
        return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}

    failed = {"status": "FAILED", "request_id": "9a1f0c…", "error": "steps must be a whole number", "metrics": _TIMES}
    return {
        200: told("Where it stands", dict(example), ["status", "request_id"]),
        404: told(
            "Unknown, or forgotten after the time that jobs are kept", {"error": "Request 9a1f0c… not found"}, ["error"]
        ),
        422: told("FAILED; `error` says why", failed, ["status", "request_id", "error"]),
        429: told("The jobs can't be read now; try again", {"error": "the jobs can't be read"}, ["error"]),
    }


HOLD = {
    "name": "hold", "in": "query", "description": "Seconds to wait for the end of the job before answering",
    "schema": {"type": "number", "minimum": 0, "maximum": MOST_HOLD_S, "default": HOLD_S},
}  # fmt: skip
BAD_HOLD: dict[str, Any] = {
    "description": f"`hold` is not a number of seconds from 0 to {MOST_HOLD_S:g}",
    "content": {"application/json": {"schema": _ERROR}},
}
_TIMES = {"inference_time": 0.18, "queue_time": 0.02, "total_time": 0.2}
_METRICS = {**_TIMES, "cost": 0.0, "remaining_credits": CREDITS}
_PICTURE = "http://HOST/generations/Q2l…w.jpeg"
STATUS = {"status": "COMPLETED", "request_id": "9a1f0c…", "metrics": _METRICS}
RESULT = {
    "status": "COMPLETED", "request_id": "9a1f0c…", "error": None, "output": _PICTURE,
    "images": [{"url": _PICTURE, "content_type": "image/jpeg", "file_name": "Q2l…w.jpeg", "file_size": "9120"}],
    "seed": "7", "prompt": "a big red star", "timings": {}, "metrics": _METRICS,
}  # fmt: skip
_SYNC: dict[str, Any] = {
    "description": "The picture; with base64 true it is inside JSON",
    "headers": {
        name: {"schema": {"type": "string"}} for name in ("x-seed-value", "x-generation-time", "x-remaining-credits")
    },
    "content": {
        "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {"type": "object", "properties": {"image": {}}, "required": ["image"]},
            "example": {"image": "/9j/4AAQSkZJRg…", "status": "Success", "infer_time": 0.18, "outputs": 1},
        },
    },
}
_QUEUED: dict[str, Any] = {
    "description": "Accepted; ask status_url for the outcome",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["request_id", "status", "status_url", "response_url"]},
            "example": {
                "request_id": "9a1f0c…", "status": "QUEUED", "poll_url": "http://HOST/v1/requests/9a1f0c…",
                "status_url": "http://HOST/v2/requests/9a1f0c…/status",
                "response_url": "http://HOST/v2/requests/9a1f0c…",
            },
        }
    },
}  # fmt: skip
