"""Who makes room where there is none left, so that nobody can take the room of others by waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def first_to_go(waiting: Iterable[T], crowd: Counter[str], address_of: Callable[[T], str]) -> T | None:
    """waiting: the longest first. crowd: how many there are by address. Of the address that has most, the first."""
    return max(waiting, key=lambda each: crowd[address_of(each)], default=None)
