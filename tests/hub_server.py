"""A small hub on 127.0.0.1: the endpoints that huggingface_hub asks, over a folder, with faults on demand.

Answers as huggingface.co does: /api/models/NAME[/revision/REV] lists files with sizes and hashes; /NAME/resolve/REV/FILE
has X-Repo-Commit and ETag, for large files X-Linked-Etag and X-Linked-Size, and honours Range.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """token: asked for where it is set. broken: file -> how many times its transfer stops in the middle. altered: files
    whose content differs from what the list says. gone: listed, and not there. failing: answered with 500. listed: what is answered in
    place of the list. asked: the requests, with their Range."""

    folder: Path
    name: str = "tiny/model"
    token: str | None = None
    gated: bool = False
    broken: dict[str, int] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    listed: bytes | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def content(self, file: str) -> bytes:
        return (self.folder / file).read_bytes()

    def listing(self) -> bytes:
        siblings = []
        for file in self.files():
            data = self.content(file)
            entry = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            if file.endswith(_LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return json.dumps({"id": self.name, "sha": COMMIT, "siblings": siblings}).encode()

    def fetched(self, method: str = "GET") -> list[str]:
        return [
            re.split("/resolve/[^/]+/", path)[1] for m, path, _ in self.asked if m == method and "/resolve/" in path
        ]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        hub, path = self.served, self.path.split("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        listed = re.fullmatch(rf"/api/models/{hub.name}(?:/revision/(.+))?", path)
        file = re.fullmatch(rf"/{hub.name}/resolve/([^/]+)/(.+)", path)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, "RepoNotFound", "Invalid username or password.", with_body)
        elif hub.gated:
            self._refuse(403, "GatedRepo", "Access to model is restricted.", with_body)
        elif not listed and not file:
            self._refuse(401, "RepoNotFound", "Repository not found", with_body)
        elif (listed or file)[1] not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound", "Invalid rev id", with_body)
        elif listed:
            self._send(
                200,
                hub.listing() if hub.listed is None else hub.listed,
                {"Content-Type": "application/json"},
                with_body,
            )
        elif file[2] in hub.failing:
            self._refuse(500, "ServerError", "Internal error", with_body)
        elif file[2] in hub.gone or file[2] not in hub.files():
            self._refuse(404, "EntryNotFound", "Entry not found", with_body)
        else:
            self._file(file[2], with_body)

    def _file(self, file: str, with_body: bool) -> None:
        hub, data = self.served, self.served.content(file)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        if file.endswith(_LARGE):
            headers["X-Linked-Etag"] = headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        if file in hub.altered:
            data = bytes([data[0] ^ 1]) + data[1:]
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = len(data)
        if with_body and hub.broken.get(file, 0) > 0:
            hub.broken[file] -= 1
            stop = start + (len(data) - start) // 2
        self._send(status, data[start:], headers, with_body, stop - start)

    def _refuse(self, status: int, code: str, text: str, with_body: bool) -> None:
        body = json.dumps({"error": text}).encode()
        self._send(status, body, {"X-Error-Code": code, "X-Error-Message": text}, with_body)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[:sent])
        if sent is not None and sent < len(body):
            self.close_connection = True
