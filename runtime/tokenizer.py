"""CLIP's tokens: text to ids by byte-pair encoding, and ids with their weights to chunks of 77."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..errors import BundleError
from .prompts import Segment

TOKENS = 77  # CLIP's context, start and end included
ROOM = TOKENS - 2
# CLIP's pattern of words, from openai/CLIP simple_tokenizer.py
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Chunks:
    """A prompt as CLIP reads it, 77 tokens at a time: ids int64 [k, 77] and each token's weight float32 [k, 77]."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


class ClipTokenizer:
    """CLIP's byte-pair encoding from a folder's vocab.json and merges.txt."""

    def __init__(self, folder: Path) -> None:
        try:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            special = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8"))
            pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
            merges = [(left, right) for left, right in pairs]
            token = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
            named = {name: token[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
            ids = {name: int(vocab[text]) for name, text in named.items()}
            bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=named["unk_token"], fuse_unk=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder}: the tokenizer can't be read: {error}") from error
        except KeyError as error:
            raise BundleError(f"{folder}: the tokenizer can't be read: it has no {error}") from error
        except (TypeError, AttributeError) as error:
            raise BundleError(f"{folder}: the tokenizer can't be read: its files are not as CLIP's: {error}") from error
        self._tokenizer = Tokenizer(bpe)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # Special tokens are found in the text before any splitting. For OpenCLIP the padding '!' is one: in a prompt it
        # becomes the bare '!' (id 0), not the '!' that ends a word, as it does in transformers.
        self._tokenizer.add_special_tokens(sorted(set(named.values()), key=vocab.__getitem__))
        self._start, self._end, self._pad = ids["bos_token"], ids["eos_token"], ids["pad_token"]

    def chunks(self, segments: Sequence[Segment]) -> Chunks:
        """As many as the segments fill, at least one; BREAK begins another. Start, end and padding weigh 1."""
        rows: list[list[tuple[int, float]]] = [[]]
        for text, weight, breaks in segments:
            if breaks:
                rows.append([])
                continue
            for token in self._tokenizer.encode(text, add_special_tokens=False).ids:
                if len(rows[-1]) == ROOM:
                    rows.append([])
                rows[-1].append((token, weight))
        ids, weights = np.full((len(rows), TOKENS), self._pad, np.int64), np.ones((len(rows), TOKENS), np.float32)
        for i, row in enumerate(rows):
            end = len(row) + 1
            ids[i, 0], ids[i, end] = self._start, self._end
            ids[i, 1:end], weights[i, 1:end] = [t for t, _ in row], [w for _, w in row]
        return Chunks(ids, weights)

    def beyond(self, segments: Sequence[Segment]) -> tuple[int, str]:
        """How many tokens a text has, and what of it does not fit the first chunk, '' where all does."""
        left, count, cut = ROOM, 0, ""
        for text, _, breaks in segments:
            if breaks:
                left = 0
                continue
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            count += len(encoding.ids)
            if len(encoding.ids) > left:
                cut += text[encoding.offsets[left][0] :]
            left = max(left - len(encoding.ids), 0)
        return count, cut.strip()
