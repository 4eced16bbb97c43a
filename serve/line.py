"""Who is next: fair shares of the device's time. Knows no thread and no picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from .job import Job


class Shares:
    """Start-time fair queuing (Goyal et al. 1996): whoever has used the least is next; who comes back after a pause
    starts level with the others, neither punished nor with savings.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._level = 0.0

    def join(self, name: str) -> None:
        self._used[name] = max(self._used.get(name, 0.0), self._level)

    def least(self, names: Iterable[str]) -> str:
        chosen = min(names, key=lambda name: self._used.get(name, 0.0))
        self._level = max(self._level, self._used.get(chosen, 0.0))
        return chosen

    def charge(self, name: str, seconds: float) -> None:
        self._used[name] = self._used.get(name, self._level) + seconds

    def forget(self, present: Iterable[str]) -> None:
        """Drops those that are not present and owe nothing, so that a year of clients takes no memory."""
        keep = set(present)
        self._used = {name: used for name, used in self._used.items() if name in keep or used > self._level}


class Line:
    """Waiting jobs: first come first served for one client, fair shares between clients."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._shares = Shares()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, job: Job) -> None:
        if job.client not in self._waiting:
            self._shares.join(job.client)
            self._waiting[job.client] = deque()
        self._waiting[job.client].append(job)
        self._length += 1

    def put_back(self, job: Job) -> None:
        """Before its client's other jobs."""
        self.add(job)
        self._waiting[job.client].rotate(1)

    def held(self, client: str) -> int:
        return len(self._waiting.get(client, ()))

    def others(self, client: str) -> int:
        """How many other clients wait, of whom each has one turn before this one's next."""
        return len(self._waiting) - (client in self._waiting)

    def capped(self, share: int) -> int:
        """How many wait, if no client counted for more than `share`."""
        return sum(min(len(mine), share) for mine in self._waiting.values())

    def remove(self, job: Job) -> bool:
        """False where it is not here (any more)."""
        mine = self._waiting.get(job.client)
        if mine is None or job not in mine:
            return False
        mine.remove(job)
        if not mine:
            del self._waiting[job.client]
            self._shares.forget(self._waiting)
        self._length -= 1
        return True

    def first(self) -> Job | None:
        """The next one, which stays here."""
        return self._waiting[self._shares.least(self._waiting)][0] if self._waiting else None

    def in_order(self) -> Iterator[Job]:
        """All of them, one of each client in turn."""
        queues = [iter(tuple(mine)) for mine in self._waiting.values()]
        while queues:
            still = []
            for queue in queues:
                job = next(queue, None)
                if job is not None:
                    yield job
                    still.append(queue)
            queues = still

    def charge(self, client: str, seconds: float) -> None:
        self._shares.charge(client, seconds)
