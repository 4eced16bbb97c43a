"""Which files of a part hold its weights, by their names alone: the same rules for a folder and for a hub repository."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_TRANSFORMERS = ("text_encoder", "text_encoder_2")  # transformers' file names; diffusers' are the others


class Weights(NamedTuple):
    """One way a part's weights are stored. variant: diffusers' name for the precision, None for the full one.

    file: the weights, or, when `sharded`, the JSON index that names their files.
    """

    file: str
    variant: str | None
    sharded: bool

    @property
    def pickled(self) -> bool:
        return ".safetensors" not in self.file


def choose_weights(part: str, names: Collection[str], *, half_first: bool, pickles: bool) -> Weights | None:
    """The files to read of a part's folder, None where it has none. safetensors before pickles, always."""
    variants = ("fp16", None) if half_first else (None, "fp16")
    for suffix in ("safetensors", "bin") if pickles else ("safetensors",):
        for variant in variants:
            for weights in _spellings(part, suffix, variant):
                if weights.file in names:
                    return weights
    return None


def expected(part: str) -> str:
    """What a part without weights should have had."""
    stem = _stem(part, "safetensors")
    return f"{stem}.safetensors or {stem}.fp16.safetensors"


def pickled(names: Iterable[str]) -> str | None:
    """The first of the names that is a pickle."""
    return min((name for name in names if name.endswith(PICKLED)), default=None)


def tokenizer_of(part: str) -> str | None:
    """'text_encoder_2' -> 'tokenizer_2'; None for parts that read no text."""
    return part.replace("text_encoder", "tokenizer") if part.startswith("text_encoder") else None


def _spellings(part: str, suffix: str, variant: str | None) -> Iterator[Weights]:
    stem = _stem(part, suffix)
    middle = f".{variant}" if variant else ""
    yield Weights(f"{stem}{middle}.{suffix}", variant, sharded=False)
    yield Weights(f"{stem}.{suffix}.index{middle}.json", variant, sharded=True)


def _stem(part: str, suffix: str) -> str:
    if part in _TRANSFORMERS:
        return "model" if suffix == "safetensors" else "pytorch_model"
    return "diffusion_pytorch_model"
