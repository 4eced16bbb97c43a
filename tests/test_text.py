"""Tokenizing, against transformers' CLIP tokenizer on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_edge.errors import BundleError
from vega_edge.models import find_bundle
from vega_edge.runtime.prompts import plain
from vega_edge.runtime.tokenizer import TOKENS, ClipTokenizer

PROMPTS = [
    "", " ", "a big red star on a blue background", "A  BIG\n\tred STAR", "it's the dog's, they're 42nd! (wow) [x:1.3]", "naïve café ﬁ Ǆ İ",
    "🌟 a star 👩‍🚀", "نجمة حمراء", "赤い星", "<|endoftext|> star <|startoftext|>", "...---...", "a star!!! !wow", "star" * 40, "a\u200bb\u00a0c", "\x00\x07",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle() -> Path:
    return find_bundle("demo-vegart")


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_2"])
def folder(request: pytest.FixtureRequest, bundle: Path) -> Path:
    return bundle / request.param


def first_chunk(folder: Path, text: str) -> np.ndarray:
    return ClipTokenizer(folder).chunks(plain(text)).ids[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_ids_as_transformers(folder: Path, prompt: str) -> None:
    reference = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folder)
    expected = reference(prompt, padding="max_length", max_length=TOKENS, truncation=True)["input_ids"]
    assert first_chunk(folder, prompt).tolist() == expected


def test_the_two_tokenizers_pad_differently(bundle: Path) -> None:
    first, second = (first_chunk(bundle / name, "star") for name in ("tokenizer", "tokenizer_2"))
    assert first[2] == first[-1] == first.max()  # the end token
    assert second[2] == first.max() and second[-1] == 0  # '!'


def test_what_lies_beyond_the_first_chunk(folder: Path) -> None:
    tokenizer = ClipTokenizer(folder)
    assert tokenizer.beyond(plain("star " * 75)) == (75, "")
    assert tokenizer.beyond(plain("star " * 75 + "moon, house")) == (78, "moon, house")


def test_ten_thousand_words(folder: Path) -> None:
    assert ClipTokenizer(folder).chunks(plain("red star " * 5000)).ids.shape == (134, TOKENS)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=120))
def test_any_text_gives_77_ids(bundle: Path, text: str) -> None:
    ids = first_chunk(bundle / "tokenizer", text)
    assert ids.shape == (TOKENS,) and ids.dtype == np.int64 and ids.min() >= 0


def test_a_folder_without_files_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the tokenizer can't be read: .*No such file"):
        ClipTokenizer(tmp_path)
