"""A server that runs: real sockets, the application in a thread, pictures by the fake of `serve_fakes`.

As a program, `python -m tests.serve_running PORT DATA LOG`, it is a whole process to be killed: every picture that is
drawn becomes a line in LOG.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vega_edge.serve.listener import Server
from vega_edge.serve.service import Service, build
from vega_edge.serve.settings import Settings

from .serve_fakes import FakeDrawer

START_S = 60.0
ALIASES = dict.fromkeys(("segmind-vega", "segmind-vega-rt-v1", "sdxl1.0-dyanvis-lightning", "smallsd1.5-txt2img", "tinysd1.5-txt2img", "potraitsd1.5-txt2img"), "demo-vegart")  # fmt: skip


@dataclass
class Running:
    url: str
    service: Service
    server: Server
    drawer: FakeDrawer
    http: httpx.Client = field(repr=False)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json={"prompt": "a star"} if body is None else body, **options)

    def ended(self, url: str) -> httpx.Response:
        """The status of a job that ends within 20 s."""
        return self.http.get(url, params={"hold": 20})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(data: Path, drawer: FakeDrawer | None = None, real: bool = False, **options: Any) -> Iterator[Running]:
    """real: the embedded model draws instead of the fake."""
    drawer = drawer or FakeDrawer()
    settings = Settings(**{"data": data, "port": free_port(), "aliases": ALIASES, "grace_s": 5.0, **options})
    service = build(settings, None if real else lambda name: drawer)
    server = Server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{settings.port}"
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        wait_until(lambda: server.started)
        yield Running(url, service, server, drawer, http)
    from vega_edge.serve.app import begin_stop

    begin_stop(service)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive(), "the server did not stop"


def wait_until(true: Any, seconds: float = START_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def main() -> None:
    port, data, log = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

    def slow(request: Any, index: int) -> None:
        time.sleep(0.1)
        if index == request.steps:
            with log.open("a") as file:
                file.write(f"{request.prompt}\n")

    drawer = FakeDrawer(before_step=slow)
    service = build(Settings(data=data, port=port, batch=1, grace_s=5.0), lambda name: drawer)
    Server(service).run()


if __name__ == "__main__":
    main()
