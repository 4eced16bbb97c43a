"""What punctuation means in prompts, chunks of long ones, and that encoded texts are remembered."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_edge.bundle import Bundle
from vega_edge.engines import Spec
from vega_edge.errors import UsageError
from vega_edge.models import find_bundle
from vega_edge.runtime.parts import Part, Parts
from vega_edge.runtime.pipeline import Pipeline
from vega_edge.runtime.prompts import Segment, a1111, plain
from vega_edge.runtime.text import Text, TextEncoder, emphasized
from vega_edge.runtime.tokenizer import ClipTokenizer

STAR = "a big red star on a blue background"


def reference(prompt: str) -> list[tuple[str, float]]:
    """The web UI's rules, character by character: each character has the product of what is around it.

    Written from its documentation: (x) 1.1, [x] 1/1.1, (x:w) w; what is open at the end closes there; one that closes
    nothing is a character; a backslash before a bracket or a backslash makes it one, before anything else it vanishes.
    """
    letters: list[list[Any]] = []
    round_at: list[int] = []
    square_at: list[int] = []

    def scale(start: int, factor: float) -> None:
        for letter in letters[start:]:
            letter[1] *= factor

    i = 0
    while i < len(prompt):
        c = prompt[i]
        weight, after = weight_at(prompt, i)
        if c == "\\":
            if i + 1 < len(prompt) and prompt[i + 1] in "\\()[]":
                letters.append([prompt[i + 1], 1.0])
                i += 1
        elif c == "(":
            round_at.append(len(letters))
        elif c == "[":
            square_at.append(len(letters))
        elif weight is not None and round_at:
            scale(round_at.pop(), weight)
            i = after - 1
        elif c == ")" and round_at:
            scale(round_at.pop(), 1.1)
        elif c == "]" and square_at:
            scale(square_at.pop(), 1 / 1.1)
        elif weight is not None:  # its bracket was never opened: all of it is text
            letters += [[x, 1.0] for x in prompt[i:after]]
            i = after - 1
        else:
            letters.append([c, 1.0])
        i += 1
    for start in round_at:
        scale(start, 1.1)
    for start in square_at:
        scale(start, 1 / 1.1)
    return [(c, w) for c, w in letters]


def weight_at(prompt: str, i: int) -> tuple[float | None, int]:
    """The number of ':1.3)' at i and where that ends, or None."""
    end = prompt.find(")", i)
    inside = prompt[i + 1 : end].strip(" ") if end > 0 else ""
    if prompt[i] != ":" or not inside or set(inside.lstrip("+-")) - set(".0123456789"):
        return None, i
    try:
        return float(inside), end + 1
    except ValueError:
        return None, i


def by_letter(segments: list[Segment]) -> list[tuple[str, float]]:
    return [(c, s.weight) for s in segments for c in s.text]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) star", [("a ", 1), ("red", 1.3), (" star", 1)]),
        ("(a) [b]", [("a", 1.1), (" ", 1), ("b", 1 / 1.1)]),
        ("((a)) (b (c:2):1.5)", [("a", 1.21), (" ", 1), ("b ", 1.5), ("c", 3)]),
        (r"a \(b\) \[c\] \\ d\e", [("a (b) [c] \\ de", 1)]),
        ("(a", [("a", 1.1)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1.0)]),
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1)]),
        ("(a:b) (c: 1.5 ) (d:)", [("a:b", 1.1), (" ", 1), ("c", 1.5), (" ", 1), ("d:", 1.1)]),
        ("(a:-0.5)(b:.5)(c:1.2.3)", [("a", -0.5), ("b", 0.5), ("c:1.2.3", 1.1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("a:b", [("a:b", 1)]),
    ],
)
def test_the_web_uis_syntax(prompt: str, expected: list[tuple[str, float]]) -> None:
    got = a1111(prompt)
    assert [s.text for s in got] == [text for text, _ in expected]
    assert [s.weight for s in got] == pytest.approx([weight for _, weight in expected])


@settings(max_examples=300, deadline=None)
@given(prompt=st.text(alphabet="ab ()[]:\\.13-", max_size=24))
def test_any_brackets_mean_what_the_reference_says(prompt: str) -> None:
    got, expected = by_letter(a1111(prompt)), reference(prompt)
    assert "".join(c for c, _ in got) == "".join(c for c, _ in expected)
    assert [w for _, w in got] == pytest.approx([w for _, w in expected])


def test_break_begins_another_chunk() -> None:
    assert a1111("a BREAK b") == [Segment("a"), Segment("", breaks=True), Segment("b")]
    assert a1111("BREAKS") == [Segment("BREAKS")]
    tokenizer = ClipTokenizer(find_bundle("demo-vegart") / "tokenizer")
    chunks = tokenizer.chunks(a1111("star BREAK (moon:2)"))
    star, moon = (tokenizer.chunks(plain(w)).ids[0] for w in ("star", "moon"))
    assert np.array_equal(chunks.ids, [star, moon])
    assert [row[:3].tolist() for row in chunks.weights] == [[1, 1, 1], [1, 2, 1]]


def test_plain_prompts_are_literal() -> None:
    assert plain("a (red:1.3) [star]") == [Segment("a (red:1.3) [star]", 1.0)]


def test_weights_and_the_mean_that_is_restored() -> None:
    hidden = np.random.default_rng(0).standard_normal((1, 77, 8), dtype=np.float32) + 0.3
    weights = np.ones(77, np.float32)
    assert emphasized(hidden, weights) is hidden
    weights[3:6] = 1.4
    expected = hidden.astype(np.float64) * weights[None, :, None]
    expected *= hidden.astype(np.float64).mean() / expected.mean()
    assert np.allclose(emphasized(hidden, weights), expected, atol=1e-5)
    for weight in (1e38, np.inf, 0.0):
        with pytest.raises(UsageError) as caught:
            emphasized(np.abs(hidden), np.full_like(weights, weight))
        assert str(caught.value) == f"the prompt weighs a word by {weight:.3g}; use weights from about 0.5 to 2"


class Encoder:
    """A stand-in whose every output tells its input: counts how often it was asked."""

    def __init__(self) -> None:
        self.inputs = {"input_ids": Spec(np.dtype(np.int64), ("batch", 77))}
        self.outputs = {f"hidden_states.{n}": Spec(np.dtype(np.float32), (None,) * 3) for n in range(20)}
        self.calls = 0

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        hidden = np.repeat(feeds["input_ids"][..., None].astype(np.float32) + 1, 4, -1)
        return {f"hidden_states.{n}": hidden for n in range(20)} | {"text_embeds": hidden[:, 1] * 10}

    def close(self) -> None:
        pass


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    text = TextEncoder(Parts(Bundle.open(find_bundle("demo-vegart"), verify=False), "onnxruntime-cpu"))
    engines = [Encoder(), Encoder()]
    text._parts = [Part(lambda e=e: e, keep=True) for e in engines]  # type: ignore[misc]
    yield SimpleNamespace(text=text, engines=engines)


def test_long_prompts_are_chunks_side_by_side(encoder: SimpleNamespace) -> None:
    long = "star " * 75 + "moon " * 80
    (inputs,) = encoder.text.encode(Text(long, long=True), None, guided=False)
    assert inputs.hidden.shape == (1, 3 * 77, 8)
    pieces = ["star " * 75, "moon " * 75, "moon " * 5]
    alone = [encoder.text.encode(Text(p), None, guided=False)[0] for p in pieces]
    assert np.array_equal(inputs.hidden, np.concatenate([a.hidden for a in alone], 1))
    assert np.array_equal(inputs.pooled, alone[0].pooled)


def test_the_shorter_of_two_prompts_is_filled_up(encoder: SimpleNamespace) -> None:
    long, empty = Text("star " * 100, long=True), encoder.text.encode(Text(""), None, guided=False)[0]
    away, toward = encoder.text.encode(long, Text("moon", long=True), guided=True)
    assert away.hidden.shape == toward.hidden.shape == (1, 154, 8)
    assert np.array_equal(away.hidden[:, 77:], empty.hidden)
    zeros, toward = encoder.text.encode(long, None, guided=True)
    assert zeros.hidden.shape == toward.hidden.shape and not zeros.hidden.any() and not zeros.pooled.any()


def test_each_encoder_weighs_by_itself(encoder: SimpleNamespace) -> None:
    (plainly,) = encoder.text.encode(Text("red star"), None, guided=False)
    (weighed,) = encoder.text.encode(Text("(red:1.5) star", "a1111"), None, guided=False)
    weights = np.ones(77, np.float32)
    weights[1] = 1.5
    halves = np.split(plainly.hidden, 2, -1)
    assert np.allclose(weighed.hidden, np.concatenate([emphasized(h, weights) for h in halves], -1))
    assert np.array_equal(weighed.pooled, plainly.pooled)


def test_texts_are_remembered_but_not_for_ever(encoder: SimpleNamespace) -> None:
    first, *_ = encoder.text.encode(Text("star"), None, guided=False)
    assert encoder.text.encode(Text("star"), None, guided=False)[0] is first
    assert [e.calls for e in encoder.engines] == [1, 1]
    with pytest.raises(ValueError, match="read-only"):
        first.hidden[0] = 0
    encoder.text.encode(Text("star", "a1111"), None, guided=False)
    assert encoder.engines[0].calls == 2
    for i in range(40):
        encoder.text.encode(Text(f"star {i}"), None, guided=False)
    assert len(encoder.text._remembered) == 32
    encoder.text.encode(Text("star"), None, guided=False)
    assert encoder.engines[0].calls == 43


def test_what_is_cut_is_said_however_it_is_spelled(encoder: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder.text.encode(Text("(star:1.2) BREAK moon", "a1111"), None, guided=False)
        encoder.text.encode(Text("star " * 80, long=True), None, guided=False)
    assert caplog.messages == [
        "the prompt has 2 tokens, CLIP reads 75 at a time; cut off: 'moon'; --long-prompt reads all of it"
    ]


def test_the_options_draw(tmp_path: Any) -> None:
    """Through the real network: a weight moves the latents, a syntax unasked for does not, long prompts run."""
    pipe = Pipeline.open("demo-vegart", engine="onnxruntime-cpu", verify=False)
    options = {"steps": 1, "seed": 1}
    plainly = pipe("a (red:1.6) star", **options).latents
    assert np.abs(plainly - pipe("a (red:1.6) star", prompt_syntax="a1111", **options).latents).max() > 1e-3
    same = pipe("a red star", prompt_syntax="a1111", **options).latents
    assert np.array_equal(same, pipe("a red star", **options).latents)
    long = pipe(STAR * 12, long_prompt=True, guidance=3.0, negative="moon", **options).latents
    assert (
        np.isfinite(long).all()
        and np.abs(long - pipe(STAR * 12, guidance=3.0, negative="moon", **options).latents).max() > 1e-4
    )
    request = pipe.request(STAR, prompt_syntax="a1111")
    assert "Prompt syntax: a1111" in request.parameters("m", "1")
    with pytest.raises(UsageError) as error:
        pipe.request(STAR, prompt_syntax="comfy")
    assert str(error.value) == "unknown prompt syntax 'comfy'; there are: a1111, plain"
    with pytest.raises(UsageError) as error:
        pipe.request(STAR, long_prompt=1)
    assert str(error.value) == "long_prompt must be True or False, got 1"


def test_a_models_own_syntax_is_kept_to() -> None:
    pipe = Pipeline.open("demo-vegart", engine="onnxruntime-cpu", verify=False)
    pipe.defaults = {**pipe.defaults, "prompt_syntax": "a1111"}
    assert pipe.request("(star)").prompt_syntax == "a1111"
    assert pipe.request("(star)", prompt_syntax="plain").prompt_syntax == "plain"
