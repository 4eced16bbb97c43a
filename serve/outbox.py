"""What waits to be sent to one live page: little, however slowly it reads. Knows no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .job import Job

MOST = 16  # messages; the oldest go
PREVIEWS = 4  # among them: a preview is megabytes until it is sent


@dataclass(eq=False)
class Message:
    """job: whose it is; nobody wants it any more when that is cancelled. make: a picture's file, which `head` describes."""

    head: dict[str, Any]
    job: Job | None = None
    make: Callable[[], bytes] | None = None

    @property
    def wanted(self) -> bool:
        return self.job is None or not self.job.cancelled

    @property
    def preview(self) -> bool:
        return bool(self.head["type"] == "preview")


class Outbox:
    """For one event loop."""

    def __init__(self) -> None:
        self._waiting: list[Message] = []
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message) -> None:
        waiting = [each for each in self._waiting if each.wanted]
        previews = [each for each in waiting if each.preview]
        if message.preview and len(previews) >= PREVIEWS:
            waiting.remove(previews[0])
        self._waiting = [*waiting, message][-MOST:]
        self._filled.set()

    async def get(self) -> Message:
        """The oldest that is still wanted, as soon as there is one."""
        while True:
            while self._waiting:
                message = self._waiting.pop(0)
                if message.wanted:
                    return message
            self._filled.clear()
            await self._filled.wait()
