"""Prompts to the network's text inputs. The only file that knows that SDXL has two encoders."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .parts import Parts
from .prompts import SYNTAXES
from .tokenizer import ROOM, TOKENS, ClipTokenizer

Array = NDArray[np.float32]
_log = logging.getLogger(__name__)
_REMEMBERED = 32  # texts; of SDXL one chunk is 0.6 MB


class Text(NamedTuple):
    """A prompt and how it is read. `syntax`: of `prompts.SYNTAXES`; `long`: all of its chunks, not the first alone."""

    prompt: str
    syntax: str = "plain"
    long: bool = False


@dataclass(frozen=True)
class TextInputs:
    """What the network is fed of a text: hidden states [1, 77 k, d] of its k chunks and, for the SDXL kind, the first
    one's pooled vector [1, p]. Read-only.
    """

    hidden: Array
    pooled: Array | None

    def zeros(self) -> TextInputs:
        return TextInputs(np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled))


class TextEncoder:
    """A bundle's tokenizers and text encoders. What was encoded lately is remembered.

    The SD kind's network reads its encoder's last layer, normed. The SDXL kind's reads the layers before the last of
    both, side by side, and the second's pooled projection (Podell et al. 2023, arXiv:2307.01952, section 2.1).
    """

    def __init__(self, parts: Parts) -> None:
        bundle = parts.bundle
        self.sdxl = bundle.sdxl
        suffixes = ("", "_2") if self.sdxl else ("",)
        self._bundle, self._suffixes = bundle, suffixes
        self._force_zeros = bool(bundle.model_index.get("force_zeros_for_empty_prompt", self.sdxl))
        self._tokenizers = [ClipTokenizer(bundle.file(f"tokenizer{s}/vocab.json").parent) for s in suffixes]
        self._layers = [bundle.number(f"text_encoder{s}", "num_hidden_layers") for s in suffixes]
        self._parts = [parts.part(f"text_encoder{s}/model.onnx") for s in suffixes]
        self._remembered: OrderedDict[Text, TextInputs] = OrderedDict()
        self._turn = threading.Lock()  # to look at what is remembered; not held while an encoder runs

    def load(self) -> None:
        for part in self._parts:
            part.load()

    def encode(self, text: Text, negative: Text | None, guided: bool) -> list[TextInputs]:
        """[prompt], or with guidance [what to move away from, prompt], of the same number of chunks.

        negative None is diffusers' default: zeros where the model asks for them, else the empty text. The shorter one
        is filled up with chunks of the empty text, as in AUTOMATIC1111's web UI.
        """
        zeros = negative is None and self.sdxl and self._force_zeros
        texts = [text]
        if guided and not zeros:
            texts.insert(0, negative or text._replace(prompt=""))
        for asked, name in zip(reversed(texts), ("the prompt", "the negative prompt"), strict=False):
            count, cut = self._beyond(asked)
            if cut:
                shown = cut if len(cut) <= 60 else f"{cut[:57]}..."
                _log.warning(
                    "%s has %d tokens, CLIP reads %d at a time; cut off: %r; --long-prompt reads all of it",
                    name, count, ROOM, shown,
                )  # fmt: skip
        found = self._all(texts)
        if guided and zeros:
            return [found[0].zeros(), found[0]]
        most = max(t.hidden.shape[1] for t in found)
        if any(t.hidden.shape[1] < most for t in found):
            (empty,) = self._all([Text("")])
            found = [_filled(t, empty, most) for t in found]
        return found

    def unread(self, text: Text) -> str:
        """What of the text is not read: its tokens beyond CLIP's first 75, unless it is `long`."""
        return self._beyond(text)[1]

    def _beyond(self, text: Text) -> tuple[int, str]:
        return (0, "") if text.long else self._tokenizers[0].beyond(SYNTAXES[text.syntax](text.prompt))

    def _all(self, texts: Sequence[Text]) -> list[TextInputs]:
        """Each text's inputs, remembered or made now: one encoder after the other, each opened once."""
        with self._turn:
            found = {text: self._remembered[text] for text in texts if text in self._remembered}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            made = zip(*[list(self._encoded(i, missing)) for i in range(len(self._parts))], strict=True)
            for text, outs in zip(missing, made, strict=True):
                found[text] = _frozen(np.concatenate([hidden for hidden, _ in outs], -1), outs[-1][1])
        with self._turn:
            for text in texts:
                self._remembered[text] = found[text]
                self._remembered.move_to_end(text)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return [found[text] for text in texts]

    def _encoded(self, index: int, texts: Sequence[Text]) -> Iterator[tuple[Array, Array | None]]:
        """Of the encoder of this index: hidden states [1, 77 k, d] and the first chunk's pooled vector, of each text."""
        state = f"hidden_states.{self._layers[index] - 1}" if self.sdxl else "last_hidden_state"
        with self._parts[index].running() as engine:
            if state not in engine.outputs:
                part, layers = f"text_encoder{self._suffixes[index]}", self._layers[index]
                raise self._bundle.misconfigured(
                    part, "num_hidden_layers", layers, f"that of its graph, which gives {', '.join(engine.outputs)}"
                )
            for text in texts:
                chunks = self._tokenizers[index].chunks(SYNTAXES[text.syntax](text.prompt))
                outs = [
                    engine.run({"input_ids": chunks.ids[i : i + 1]}) for i in range(len(chunks) if text.long else 1)
                ]
                hidden = [
                    emphasized(out[state].astype(np.float32), w) for out, w in zip(outs, chunks.weights, strict=False)
                ]
                pooled = outs[0]["text_embeds"].astype(np.float32) if self.sdxl and index else None
                yield np.concatenate(hidden, 1), pooled

    def feeds(self, texts: list[TextInputs], samples: int, width: int, height: int) -> dict[str, Array]:
        """The network's feeds, each text repeated for every sample: [len(texts) * samples, ...]."""
        feeds = {"encoder_hidden_states": np.concatenate([np.repeat(t.hidden, samples, 0) for t in texts])}
        if self.sdxl:
            pooled = [np.repeat(t.pooled, samples, 0) for t in texts if t.pooled is not None]
            feeds["text_embeds"] = np.concatenate(pooled)
            # original size, crop corner, target size, rows first: the size conditioning of SDXL (section 2.2)
            ids = np.array([[height, width, 0, 0, height, width]], np.float32)
            feeds["time_ids"] = np.repeat(ids, len(texts) * samples, 0)
        return feeds


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


def emphasized(hidden: Array, weights: Array) -> Array:
    """Hidden states [1, 77, d] times their tokens' weights [77], brought back to the mean they had: the web UI's
    "Original" emphasis (its `modules/sd_emphasis.py`), done for each encoder and chunk by itself. UsageError for weights
    that leave no numbers.
    """
    if np.all(weights == 1):
        return hidden
    with np.errstate(all="ignore"):
        weighted: Array = hidden * weights[None, :, None]
        weighted *= hidden.mean() / weighted.mean()
    if not np.isfinite(weighted).all():
        raise UsageError(f"the prompt weighs a word by {np.abs(weights).max():.3g}; use weights from about 0.5 to 2")
    return weighted


def _filled(text: TextInputs, empty: TextInputs, tokens: int) -> TextInputs:
    more = (tokens - text.hidden.shape[1]) // TOKENS
    return _frozen(np.concatenate([text.hidden, *[empty.hidden] * more], 1), text.pooled)


def _frozen(hidden: Array, pooled: Array | None) -> TextInputs:
    for array in (hidden, pooled):
        if array is not None:
            array.setflags(write=False)
    return TextInputs(hidden, pooled)
