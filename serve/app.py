"""The application: routes, what surrounds them, and its beginning and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..errors import VegaEdgeError
from . import live, openapi, routes_page, routes_v1, routes_v2
from .guard import Guard, error_response
from .service import ClientLeft, Service, status_of
from .telling import told

_log = logging.getLogger(__name__)


def make_app(service: Service) -> Guard:
    """An ASGI application; `begin_stop` makes it refuse and finish, its lifespan's end waits for that."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.queue.start()
        service.worker.start([service.entries[name].recipe.name for name in service.settings.preload])
        yield
        begin_stop(service)
        await asyncio.to_thread(service.worker.join, service.settings.grace_s + 10)
        await service.queue.stop()

    app = FastAPI(
        title="vega-edge", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False, description="Segmind's text-to-image API on your own box.",
    )  # fmt: skip
    app.openapi = lambda: openapi.describe(app, service)  # type: ignore[method-assign]
    for routes in (routes_page, live, routes_v2, routes_v1):
        app.include_router(routes.router(service))
    app.add_exception_handler(VegaEdgeError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeft, _gone)
    app.add_exception_handler(Exception, _defect)
    return Guard(app, service)


def begin_stop(service: Service) -> None:
    """Once: no new work, the running picture is finished, the waiting ones stay on disk or are refused."""
    if not service.stopping:
        service.stopping = True
        service.worker.stop(service.settings.grace_s)
        service.queue.release_polls()


async def _ours(request: HttpRequest, error: Exception) -> Response:
    status, headers = status_of(error)
    answer = _error(request, status, told(error), headers)
    request.scope["log"]["error"] = str(error)[:300]
    return answer


async def _http(request: HttpRequest, error: Any) -> Response:
    status, text = error.status_code, str(error.detail)
    if status == 405 and request.scope["path"].count("/") == 1 and request.scope["method"] in ("GET", "HEAD"):
        status, text = 404, "Not Found"  # POST /{slug} makes every short path one that exists
    return _error(request, status, text, dict(error.headers or {}))


async def _gone(request: HttpRequest, error: Exception) -> Response:
    request.scope["log"]["left"] = True
    return Response(status_code=499)  # which nobody reads


async def _defect(request: HttpRequest, error: Exception) -> Response:
    _log.error("request %s failed on a defect", request.scope["log"]["id"], exc_info=error)
    return _error(request, 500, f"an internal error; the log has it under {request.scope['log']['id']}", {})


def _error(request: HttpRequest, status: int, text: str, headers: dict[str, str]) -> JSONResponse:
    request.scope["log"]["error"] = text[:300]
    return error_response(status, text, headers)
