"""What is drawn for someone: a job, and what its listener hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..errors import VegaEdgeError
from ..runtime.request import Request
from ..runtime.tokenizer import ROOM

DEFECT = "an internal error; it is in the log"  # of a job: nothing of ours leaks to a client
_PROMPTS = {"prompt": "prompt", "negative": "negative_prompt"}  # as the API calls them


class Overloaded(VegaEdgeError):
    """Not now; `retry_s`: when it may be worth another try."""

    def __init__(self, text: str, retry_s: float) -> None:
        super().__init__(text)
        self.retry_s = retry_s


class Stopping(VegaEdgeError):
    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again in a moment")


class TookTooLong(VegaEdgeError):
    pass


@dataclass(frozen=True)
class Started:
    """A walk has begun. queue_s: how long the job had waited."""

    queue_s: float


@dataclass(frozen=True)
class Stepped:
    """A step is done. preview: the picture as it would be if the walk ended here, where one was asked for and made."""

    index: int
    total: int | None
    preview: Image.Image | None


@dataclass(frozen=True)
class Done:
    """images: one a sample. seconds: queue, text, denoise, decode, and draw, which is the last three. together: the
    pictures in its batch. unread: prompt, negative, those that were not read to their ends."""

    images: list[Image.Image]
    request: Request
    model: str
    seconds: Mapping[str, float]
    together: int = 1
    unread: tuple[str, ...] = ()

    @property
    def cut_off(self) -> list[str]:
        """What a client is told of the prompts that were not read to their ends."""
        return [f"{_PROMPTS[name]} cut off after {ROOM} tokens" for name in self.unread]


@dataclass(frozen=True)
class Failed:
    """A VegaEdgeError is for the user; anything else is a defect and is in the log. queue_s, draw_s: spent on it."""

    error: BaseException
    queue_s: float = 0.0
    draw_s: float = 0.0


Event = Started | Stepped | Done | Failed


@dataclass(eq=False)
class Job:
    """client: who the device is shared among. model: a name that `Residents` knows. options: of `Pipeline.request`,
    with a seed. listener: called on the device's thread, so it must be quick and must not raise; Started comes once,
    before anything is drawn; after Done or Failed, or a cancel, it hears nothing more. previews: "off", "auto" or "on".
    alone: never in a batch with others, since it may be what ended a batch or a process before.
    """

    client: str
    model: str
    prompt: str
    options: Mapping[str, Any]
    listener: Callable[[Event], None]
    live: bool = False
    previews: str = "off"
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    alone: bool = False
    started: bool = False
    request: Request | None = None  # as soon as its model is open

    @property
    def samples(self) -> int:
        return int(self.options.get("samples") or 1)
