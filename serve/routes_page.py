"""The page, the API's description, and what a supervisor asks: healthz, readyz, metrics."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from .service import NotFound, Service
from .telling import without_folders

_FOLDER = Path(__file__).with_name("page")
_FILES = {
    "app.css": "text/css", "app.js": "text/javascript", "live.js": "text/javascript", "history.js": "text/javascript",
    "controls.js": "text/javascript", "kiosk.js": "text/javascript", "frames.js": "text/javascript",
    "memory.js": "text/javascript", "docs.js": "text/javascript", "docs.css": "text/css", "icon.svg": "image/svg+xml",
}  # fmt: skip
# Nothing but our own files, so that a picture's prompt can never become a script.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_FOLDER / "index.html", media_type="text/html", headers=_HEADERS)

    @routes.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(_FOLDER / "docs.html", media_type="text/html", headers=_HEADERS)

    @routes.api_route("/page/{file}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(file: str) -> Response:
        if file not in _FILES:
            raise NotFound(f"{file[:80]!r} not found")
        return FileResponse(_FOLDER / file, media_type=_FILES[file], headers=_HEADERS)

    @routes.get("/openapi.json", include_in_schema=False)
    async def description(request: HttpRequest) -> Response:
        return JSONResponse(request.app.openapi())

    @routes.head("/healthz", include_in_schema=False)  # as `wget --spider` asks
    @routes.get("/healthz", tags=["server"], summary="Whether the process works")
    async def healthz() -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "the device's thread has ended"}, 200 if alive else 500)

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", tags=["server"], summary="Whether it can take work now", responses={503: {}})
    async def readyz() -> Response:
        why = _not_ready(service)
        return JSONResponse({"ready": not why, "why": why}, 503 if why else 200)

    @routes.get("/metrics", tags=["server"], summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _not_ready(service: Service) -> list[str]:
    why = []
    if service.stopping:
        why.append("shutting down")
    elif not service.worker.alive:
        why.append("the device's thread has ended")
    if not service.worker.preloaded:
        why.append("models are being opened")
    if service.worker.failure:
        why.append(service.worker.failure)
    if service.keys is not None and service.keys.failure:
        why.append(service.keys.failure)
    if service.queue.failure:
        why.append(f"v2 jobs are not accepted: {service.queue.failure}")
    return [without_folders(text) for text in why]  # anybody may ask
