"""Prompts to the network's text inputs. The only file that knows that SDXL has two encoders."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..bundle import Bundle
from ..engines import Engine, open_engine
from ..errors import BundleError, UsageError

TOKENS = 77  # CLIP's context, start and end included
_log = logging.getLogger(__name__)
# CLIP's pattern of words, from openai/CLIP simple_tokenizer.py
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's byte-pair encoding from a folder's vocab.json and merges.txt: text to 77 ids."""

    def __init__(self, folder: Path) -> None:
        try:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            special = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8"))
            pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
            merges = [(left, right) for left, right in pairs]
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder}: the tokenizer can't be read: {error}") from error
        token = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
        bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=token["unk_token"], fuse_unk=False)
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
        special_tokens = {token["bos_token"], token["eos_token"], token["unk_token"], token["pad_token"]}
        self._tokenizer.add_special_tokens(sorted(special_tokens, key=vocab.__getitem__))
        self._start, self._end = vocab[token["bos_token"]], vocab[token["eos_token"]]
        self._pad = vocab[token["pad_token"]]

    def __call__(self, text: str) -> NDArray[np.int64]:
        """int64 [1, 77]; what does not fit is cut off at the end."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._start, *ids[: TOKENS - 2], self._end]
        return np.array([ids + [self._pad] * (TOKENS - len(ids))], np.int64)

    def warn_of_cut(self, text: str, name: str) -> None:
        """Logs a warning that says what of `text`, called `name`, does not fit."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = TOKENS - 2
        if len(encoding.ids) > room:
            cut = text[encoding.offsets[room][0] :].strip()
            shown = cut if len(cut) <= 60 else f"{cut[:57]}..."
            _log.warning("%s has %d tokens, CLIP reads %d; cut off: %r", name, len(encoding.ids), room, shown)


@dataclass(frozen=True)
class TextInputs:
    """What the network is fed of a text: hidden states [1, 77, d] and, for the SDXL kind, the pooled vector [1, p]."""

    hidden: NDArray[np.float32]
    pooled: NDArray[np.float32] | None

    def zeros(self) -> TextInputs:
        return TextInputs(np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled))


class TextEncoder:
    """A bundle's tokenizers and text encoders.

    The SD kind's network reads its encoder's last layer, normed. The SDXL kind's reads the layers before the last of
    both, side by side, and the second's pooled projection (Podell et al. 2023, arXiv:2307.01952, section 2.1).
    """

    def __init__(self, bundle: Bundle, engine: str) -> None:
        self._sdxl = "text_encoder_2" in bundle.model_index
        suffixes = ("", "_2") if self._sdxl else ("",)
        self._force_zeros = bool(bundle.model_index.get("force_zeros_for_empty_prompt", self._sdxl))
        self._tokenizers = [ClipTokenizer(bundle.file(f"tokenizer{s}/vocab.json").parent) for s in suffixes]
        self._layers = [int(bundle.config(f"text_encoder{s}")["num_hidden_layers"]) for s in suffixes]
        self._engines: list[Engine] = [open_engine(bundle.graph(f"text_encoder{s}"), engine) for s in suffixes]

    def encode(self, text: str, name: str = "the prompt") -> TextInputs:
        """`name` is what a warning calls the text, should it be too long."""
        self._tokenizers[0].warn_of_cut(text, name)
        outs = [e.run({"input_ids": t(text)}) for t, e in zip(self._tokenizers, self._engines, strict=True)]
        if not self._sdxl:
            return TextInputs(outs[0]["last_hidden_state"].astype(np.float32), None)
        hidden = [o[f"hidden_states.{n - 1}"] for o, n in zip(outs, self._layers, strict=True)]
        return TextInputs(np.concatenate(hidden, -1).astype(np.float32), outs[1]["text_embeds"].astype(np.float32))

    def encode_negative(self, text: str | None, like: TextInputs) -> TextInputs:
        """What guidance moves away from. None is diffusers' default: zeros where the model asks for them, else ''."""
        if text is None and self._sdxl and self._force_zeros:
            return like.zeros()
        return self.encode(text or "", "the negative prompt")

    def feeds(self, texts: list[TextInputs], samples: int, width: int, height: int) -> dict[str, NDArray[np.float32]]:
        """The network's feeds, each text repeated for every sample: [len(texts) * samples, ...]."""
        feeds = {"encoder_hidden_states": np.concatenate([np.repeat(t.hidden, samples, 0) for t in texts])}
        if self._sdxl:
            pooled = [np.repeat(t.pooled, samples, 0) for t in texts if t.pooled is not None]
            feeds["text_embeds"] = np.concatenate(pooled)
            # original size, crop corner, target size, rows first: the size conditioning of SDXL (section 2.2)
            ids = np.array([[height, width, 0, 0, height, width]], np.float32)
            feeds["time_ids"] = np.repeat(ids, len(texts) * samples, 0)
        return feeds

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def side_by_side(feeds: Sequence[Mapping[str, NDArray[np.float32]]], texts_each: int) -> dict[str, NDArray[np.float32]]:
    """The feeds of several requests as those of one batch: first every request's rows of its first text, then of its
    second. UsageError where they are of different lengths."""
    joined = {}
    for name in feeds[0]:
        rows = [np.split(each[name], texts_each) for each in feeds]
        if len({r[0].shape[1:] for r in rows}) > 1:
            raise UsageError(f"requests whose prompts take different lengths of {name} can't share a batch")
        joined[name] = np.concatenate([row[text] for text in range(texts_each) for row in rows])
    return joined
