"""What a prompt's punctuation means: nothing, or AUTOMATIC1111's weights. Text to segments of one weight each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_ROUND, _SQUARE = 1.1, 1 / 1.1
# An escaped character, a bracket's end with its weight, a bracket, a run of anything else, or a lone colon or backslash
_TOKENS = re.compile(r"\\[\\()\[\]]|:\s*[+-]?[.\d]+\s*\)|[()\[\]]|[^\\()\[\]:]+|[:\\]")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Segment(NamedTuple):
    """`breaks`: no text, but the beginning of another chunk."""

    text: str
    weight: float = 1.0
    breaks: bool = False


@dataclass
class _Open:
    """Segments so far, and where each bracket began that is still open."""

    segments: list[Segment] = field(default_factory=list)
    round: list[int] = field(default_factory=list)
    square: list[int] = field(default_factory=list)

    def multiply(self, start: int, factor: float) -> None:
        self.segments[start:] = [s._replace(weight=s.weight * factor) for s in self.segments[start:]]


def plain(prompt: str) -> list[Segment]:
    """The prompt as it stands: parentheses are characters."""
    return [Segment(prompt)]


def a1111(prompt: str) -> list[Segment]:
    r"""AUTOMATIC1111's syntax: (more) 1.1 times, [less] 1 / 1.1 times, (word:1.3) 1.3 times, nested ones multiply;
    \( \) \[ \] \\ are characters, and a backslash before another is none; BREAK begins another chunk of 77 tokens. A bracket that is never closed ends with the
    prompt, one that was never opened is a character. Facts from its `modules/prompt_parser.py`.
    """
    state = _Open()
    for match in _TOKENS.finditer(prompt):
        token = match[0]
        if token == "(":
            state.round.append(len(state.segments))
        elif token == "[":
            state.square.append(len(state.segments))
        elif token == ")" and state.round:
            state.multiply(state.round.pop(), _ROUND)
        elif token == "]" and state.square:
            state.multiply(state.square.pop(), _SQUARE)
        elif token[0] == ":" and len(token) > 1 and state.round and (weight := _number(token[1:-1])) is not None:
            state.multiply(state.round.pop(), weight)
        elif token[0] == "\\" and len(token) > 1:
            state.segments.append(Segment(token[1]))
        elif token != "\\":
            _append(state.segments, token)
    for start in state.round:
        state.multiply(start, _ROUND)
    for start in state.square:
        state.multiply(start, _SQUARE)
    return _joined(state.segments) or [Segment("")]


SYNTAXES: Mapping[str, Callable[[str], list[Segment]]] = {"plain": plain, "a1111": a1111}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "1.2.3", which the web UI fails on: it is text here
        return None


def _append(segments: list[Segment], text: str) -> None:
    for i, piece in enumerate(_BREAK.split(text)):
        if i:
            segments.append(Segment("", breaks=True))
        if piece:
            segments.append(Segment(piece))


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of one weight are one text: they are tokenized together."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and not (segment.breaks or last.breaks) and last.weight == segment.weight:
            joined[-1] = Segment(last.text + segment.text, last.weight)
        else:
            joined.append(segment)
    return joined
