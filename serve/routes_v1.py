"""`POST /v1/{slug}`: a picture while the client waits. The wire format is that of Segmind's API pages."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from .images import encode
from .job import Done, Job
from .params import Asked, parse_body, read
from .service import Service, read_body
from .settings import CREDITS

ADJUSTED = "x-vega-edge-adjusted"


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    # The second is a sample's in Segmind's documentation, the third what the SDK asks where its base_url has no /v1.
    for path in ("/v1/{slug}", "/v1/models/{slug}", "/{slug}"):

        @routes.post(path, include_in_schema=False)
        async def generate(slug: str, request: HttpRequest) -> Response:
            return await _generate(service, slug, request)

    @routes.get("/v1/get-user-credits", summary="A number: nothing is charged here", tags=["account"])
    async def credits() -> dict[str, float]:
        return {"credits": CREDITS, "free-credits": 0.0}

    return routes


async def _generate(service: Service, slug: str, request: HttpRequest) -> Response:
    start = time.perf_counter()
    entry = service.entry(slug)
    settings = service.settings
    body = await parse_body(await read_body(request), request.headers.get("content-type", ""))
    asked = read(body, entry, settings.limits, settings.prompt_chars)
    asked = asked if asked.base64 else _one(asked)
    service.charge(request.scope["client_name"], asked.options)
    note(request, settings.log_prompts, asked, model=entry.recipe.name)
    job = Job(request.scope["client_name"], entry.recipe.name, asked.prompt, asked.options, lambda event: None)
    left = asyncio.ensure_future(_left(request))
    try:
        done = await service.draw(job, left)
    finally:
        left.cancel()
    encoding = time.perf_counter()
    pictures = await asyncio.to_thread(
        lambda: [encode(im, done.request, done.model, i) for i, im in enumerate(done.images)]
    )
    service.metrics.stage(entry.recipe.name, "encode", time.perf_counter() - encoding)
    service.metrics.stage(entry.recipe.name, "total", time.perf_counter() - start)
    request.scope["log"].update(queue_s=round(done.seconds["queue"], 3), draw_s=round(done.seconds["draw"], 3))
    headers = _headers(done, asked)
    if not asked.base64:
        return Response(pictures[0], media_type="image/jpeg", headers=headers)
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    answer = {
        "image": texts[0] if len(texts) == 1 else texts, "status": "Success",
        "infer_time": round(done.seconds["draw"], 4), "outputs": len(texts),
    }  # fmt: skip
    return JSONResponse(answer, headers=headers)


def _one(asked: Asked) -> Asked:
    """A JPEG is one picture, so more are not drawn."""
    if asked.options.get("samples", 1) == 1:
        return asked
    options = {**asked.options, "samples": 1}
    return Asked(asked.prompt, options, False, (*asked.adjusted, "samples=1 (base64 true gives all)"))


def note(request: HttpRequest, prompts: bool, asked: Asked, **facts: Any) -> None:
    """What the request's line in the log says of it; the prompt only where the user wants that."""
    request.scope["log"].update(facts, seed=asked.options["seed"], **({"prompt": asked.prompt} if prompts else {}))


def _headers(done: Done, asked: Asked) -> dict[str, str]:
    """Those that the pages and clients read; the last, where it is there, says what was drawn otherwise than asked."""
    size = {"height": done.request.height, "width": done.request.width}
    headers = {
        "x-remaining-credits": str(CREDITS), "x-cost": "0.0", "x-seed-value": str(done.request.seed),
        "x-generation-time": f"{done.seconds['draw']:.4f}", "x-output-metadata": json.dumps(size),
    }  # fmt: skip
    return {**headers, **adjusted([*asked.adjusted, *done.cut_off])}


def adjusted(what: Sequence[str]) -> dict[str, str]:
    """The header that says what is drawn otherwise than asked, where anything is."""
    return {ADJUSTED: ", ".join(what)} if what else {}


async def _left(request: HttpRequest) -> None:
    """Returns when the client has gone. The body is read already, so that is all that can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
