"""A pipeline for the server's tests: real requests, made-up pictures, and a gate before every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from PIL import Image

from vega_edge.errors import UsageError
from vega_edge.runtime.request import Limits, Request, alike, make_request
from vega_edge.serve.job import Done, Failed, Job

DEFAULTS = {"steps": 2, "guidance": 0.0, "scheduler": "LCM", "width": 64, "height": 64}
LIMITS = Limits(steps=(1, 50), size_px=(64, 256))
WAIT_S = 20.0  # for what happens at once on an idle machine


@dataclass
class FakeDrawer:
    """Draws pictures whose one colour is their seed. `before_step(request, index)` may wait or raise."""

    name: str = "demo-vegart"
    engine: str = "fake"
    before_step: Callable[[Request, int], None] = lambda request, index: None
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        self.batches: list[list[str]] = []
        self.steps: list[tuple[str, int]] = []
        self.closed = False
        self.previews = 0

    def request(self, prompt: str, **options: Any) -> Request:
        return make_request({"prompt": prompt, **options}, DEFAULTS, self.limits)

    def draw(self, requests: Sequence[Request]) -> Generator[Any, None, list[Any]]:
        if not all(alike(requests[0], other) for other in requests):
            raise UsageError("not alike")
        self.batches.append([r.prompt for r in requests])
        for index in range(1, requests[0].steps + 1):
            self.before_step(requests[0], index)
            self.steps.append((requests[0].prompt, index))
            yield SimpleNamespace(index=index, total=requests[0].steps, preview=lambda: [self._look(requests[0])])
        timings = {"text": 0.001, "denoise": 0.002, "decode": 0.003}
        return [
            SimpleNamespace(images=[colour(r, s) for s in r.seeds], request=r, timings=timings, unread={})
            for r in requests
        ]

    def _look(self, request: Request) -> Image.Image:
        self.previews += 1
        return colour(request, 0)

    def close(self) -> None:
        self.closed = True


def colour(request: Request, seed: int) -> Image.Image:
    return Image.new("RGB", (request.width, request.height), (seed % 256, 0, 0))


class Heard:
    """A listener that keeps what it hears; `end()` waits for the last of it."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._ended = threading.Event()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, (Done, Failed)):
            self._ended.set()

    def end(self) -> Any:
        assert self._ended.wait(WAIT_S), f"no end, only {self.events}"
        return self.events[-1]

    @property
    def ended(self) -> bool:
        return self._ended.is_set()


def job(
    prompt: str = "a star", client: str = "me", live: bool = False, model: str = "demo-vegart", **options: Any
) -> Job:
    previews = options.pop("previews", "off")
    heard = Heard()
    return Job(client, model, prompt, {"seed": 7, **options}, heard, live, previews)


class Gate:
    """Holds the fake back: `before_step` waits until the test lets it through."""

    def __init__(self) -> None:
        self.arrived, self._open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, request: Request, index: int) -> None:
        self.arrived.release()
        assert self._open.acquire(timeout=WAIT_S)

    def wait(self) -> None:
        assert self.arrived.acquire(timeout=WAIT_S), "the worker did not get here"

    def let(self, steps: int = 1) -> None:
        self._open.release(steps)
