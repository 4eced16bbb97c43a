"""`POST /v2/{slug}` and what asks for its outcome: the queue of Segmind's API, with a poll that waits for the end."""

from __future__ import annotations

import asyncio
import base64
import math
import re
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..errors import UsageError
from .openapi import BAD_HOLD, HOLD, RESULT, STATUS, answers
from .params import parse_body, read
from .record import COMPLETED, FAILED, QUEUED, Record
from .routes_v1 import adjusted, note
from .service import NotFound, Service, read_body
from .settings import CREDITS, HOLD_S, MOST_HOLD_S

_ID = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[A-Za-z0-9_-]{32}\.jpeg")


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v2/{slug}", include_in_schema=False)
    async def submit(slug: str, request: HttpRequest) -> Response:
        return await _submit(service, slug, request)

    @routes.get(
        "/v2/requests/{request_id}/status", tags=["queue"], responses={**answers(STATUS), 400: BAD_HOLD},
        openapi_extra={"parameters": [HOLD]}, summary="Whether it is drawn; held open for `hold` seconds while it is not",
    )  # fmt: skip
    async def status(request_id: str, request: HttpRequest) -> Response:
        return _status_of(await _find(service, request_id, _hold_s(request)), request)

    for path, about in (
        ("/v2/requests/{request_id}", "The outcome"),
        ("/v1/requests/{request_id}", "The outcome, for old clients"),
    ):

        @routes.get(path, tags=["queue"], responses=answers(RESULT), summary=about)
        async def result(request_id: str, request: HttpRequest) -> Response:
            record = await _find(service, request_id)
            if record.status == COMPLETED:
                answer = await asyncio.to_thread(_result, service, record, request)
                return JSONResponse(answer, headers=adjusted(record.adjusted))
            return _status_of(record, request)

    @routes.api_route("/generations/{file}", methods=["GET", "HEAD"], include_in_schema=False, summary="A picture")
    async def picture(file: str) -> Response:
        missing = NotFound(f"{file[:80]!r} not found")
        if not _FILE.fullmatch(file):
            raise missing
        try:  # read at once: its time may end at any moment
            data = await asyncio.to_thread((service.settings.data / "generations" / file).read_bytes)
        except FileNotFoundError:
            raise missing from None
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600, immutable"})

    return routes


async def _submit(service: Service, slug: str, request: HttpRequest) -> Response:
    """Wrong parameters are accepted and fail as a job, as the API does it; a body that is no JSON is refused."""
    entry = service.entry(slug)
    body = await parse_body(await read_body(request), request.headers.get("content-type", ""))
    client, model = request.scope["client_name"], entry.recipe.name
    headers: dict[str, str] = {}
    try:
        asked = read(body, entry, service.settings.limits, service.settings.prompt_chars)
    except UsageError as error:
        job = service.queue.submit_failed(str(error), model, client)
    else:
        note(request, service.settings.log_prompts, asked, model=model)
        service.charge(client, asked.options)
        headers = adjusted(asked.adjusted)
        job = await service.queue.submit(asked, model, client)
    request.scope["log"]["job"] = job
    urls = _urls(job, request)
    body = {"request_id": job, "status": QUEUED, "poll_url": f"{_base(request)}/v1/requests/{job}", **urls}
    return JSONResponse(body, headers=headers)


def _hold_s(request: HttpRequest) -> float:
    """The query's `hold`, in seconds."""
    text = request.query_params.get("hold")
    if text is None:
        return HOLD_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MOST_HOLD_S:  # which NaN is not either
        raise UsageError(f"hold: must be seconds from 0 to {MOST_HOLD_S:g}, got {text[:80]!r}")
    return seconds


async def _find(service: Service, job: str, hold_s: float = 0.0) -> Record:
    record = await service.queue.get(job, hold_s) if _ID.fullmatch(job) else None
    if record is None:
        raise _not_found(job)
    return record


def _not_found(job: str) -> NotFound:
    return NotFound(f"Request {job[:80]} not found")


def _status_of(record: Record, request: HttpRequest) -> Response:
    status = 422 if record.status == FAILED else 200
    return JSONResponse(_status(record, request), status, adjusted(record.adjusted))


def _status(record: Record, request: HttpRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"status": record.status, "request_id": record.id}
    if record.status == FAILED:
        return {**body, "error": record.error, "metrics": _times(record)}
    if record.status == COMPLETED:
        return {**body, "metrics": _metrics(record), **_adjusted(record)}
    return {**body, **_urls(record.id, request), "metrics": {}}


def _result(service: Service, record: Record, request: HttpRequest) -> dict[str, Any]:
    folder = service.settings.data / "generations"
    try:  # its pictures' time may end at any moment
        sizes = [(folder / file).stat().st_size for file in record.files]
        data = [(folder / file).read_bytes() for file in record.files if record.base64]
    except FileNotFoundError:
        raise _not_found(record.id) from None
    images = [
        {
            "url": f"{_base(request)}/generations/{file}", "content_type": "image/jpeg", "file_name": file,
            "file_size": str(size),
        }
        for file, size in zip(record.files, sizes, strict=True)
    ]  # fmt: skip
    result: dict[str, Any] = {
        "status": COMPLETED, "request_id": record.id, "error": None, "output": images[0]["url"], "images": images,
        "seed": str(record.options["seed"]), "prompt": record.prompt, "timings": {}, "metrics": _metrics(record),
        **_adjusted(record),
    }  # fmt: skip
    if record.base64:
        texts = [base64.b64encode(each).decode() for each in data]
        result["image"] = texts[0] if len(texts) == 1 else texts
    return result


def _adjusted(record: Record) -> dict[str, Any]:
    """A field of ours, which the API's answers do not have."""
    return {"adjusted": list(record.adjusted)} if record.adjusted else {}


def _metrics(record: Record) -> dict[str, Any]:
    return {**_times(record), "cost": 0.0, "remaining_credits": CREDITS}


def _times(record: Record) -> dict[str, Any]:
    """In seconds; 0 where there was none, or where it ended with the process. A retry is a start after the first."""
    retries = {"retry_count": record.attempts - 1} if record.attempts > 1 else {}
    return {"inference_time": 0.0, "queue_time": 0.0, "total_time": 0.0, **record.metrics, **retries}


def _urls(job: str, request: HttpRequest) -> dict[str, str]:
    base = f"{_base(request)}/v2/requests/{job}"
    return {"status_url": f"{base}/status", "response_url": base}


def _base(request: HttpRequest) -> str:
    """The address by which the client called us: its URLs must work where it is."""
    return f"{request.scope['scheme']}://{request.headers['host']}"
