"""v2 jobs whose parameters were wrong: FAILED as they came, and asked for once or twice. Few, and in memory alone."""

from __future__ import annotations

import time
from collections import Counter

from .record import Record

MOST = 1024


class Refused:
    """keep_s: as all jobs. Where there are too many, the oldest goes of the client that has most of them, so that nobody
    takes the room of others."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._records: dict[str, Record] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        if len(self._records) >= MOST:
            ((greedy, _),) = Counter(each.client for each in self._records.values()).most_common(1)
            del self._records[next(each.id for each in self._records.values() if each.client == greedy)]
        self._records[record.id] = record

    def get(self, job: str) -> Record | None:
        record = self._records.get(job)
        if record is None or record.created >= time.time() - self._keep_s:
            return record
        del self._records[job]
        return None
