"""LoRAs added to a bundle as it is opened: which initializers change, and to what. numpy; nothing is written to disk.

A patched weight is stored as the graph stores it (fp32, fp16 or bf16), rounded once: that is what the exporter does
when it fuses a LoRA, so that the same file gives the same weights both ways, and a half-precision bundle stays half
as large in memory. Knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BundleError, CheckpointError
from ..lora import LoraLayer, match_lora, read_lora
from ..manifest import Parameter
from ..onnx_file import Weight, read_weights, to_stored
from ..whole_file import sha256_of

Loras = Sequence[tuple[Path, float]]
_STRIP = 64  # rows
_LARGEST = {"fp16": 65504.0, "bf16": 3.39e38, "fp32": 3.4e38}


class Patches:
    """The LoRAs of one opened bundle, checked when made: CheckpointError or BundleError says what does not fit.

    `parts`: those that they change; one of strength 0 changes none. `hashes`: each other file's sha256 with its strength,
    in order. `key`: a text that two sets
    of LoRAs share only if they are the same; '' for none.
    """

    def __init__(self, bundle: Bundle, loras: Loras) -> None:
        self._bundle, self.loras = bundle, tuple(loras)
        self.key, self.parts, self.hashes = "", frozenset[str](), tuple[tuple[str, float], ...]()
        if not loras:
            return
        _check_bundle(bundle)
        for path, strength in loras:
            if not math.isfinite(strength):
                raise CheckpointError(
                    f"LoRA {path}: its strength is {strength}; it must be a finite number, 1 is as trained"
                )
        self._maps = {part: dict(entry.parameters) for part, entry in _parts(bundle) if entry.parameters}
        self._weights = {part: read_weights(bundle.graph(part)) for part in self._maps}
        shapes = {part: {name: self._shape(part, name) for name in names} for part, names in self._maps.items()}
        self._shapes = shapes
        touched = [(match_lora(read_lora(path), shapes), strength) for path, strength in loras]
        self.parts = frozenset(part for parts, strength in touched for part in parts if strength)
        self.hashes = tuple((sha256_of(path), float(strength)) for path, strength in loras if strength)
        self.key = " ".join(f"{digest}:{strength!r}" for digest, strength in self.hashes)

    def of(self, part: str) -> dict[str, NDArray[Any]]:
        """Initializer -> its new values, for the graph of `part`. Made anew each time: the caller owns the memory."""
        if part not in self.parts:
            return {}
        return dict(self._patched(part))

    def _patched(self, part: str) -> Iterator[tuple[str, NDArray[Any]]]:
        found = [(match_lora(read_lora(path), self._shapes).get(part, {}), s) for path, s in self.loras if s]
        for name in sorted({name for layers, _ in found for name in layers}):
            layers = [(by_name.pop(name), strength) for by_name, strength in found if name in by_name]
            place = self._maps[part][name]
            yield place.initializer, self._patch(part, name, place, layers)

    def _patch(self, part: str, name: str, place: Parameter, layers: list[tuple[LoraLayer, float]]) -> NDArray[Any]:
        weight = self._weights[part][place.initializer]
        values = weight.read()
        for layer, strength in layers:
            delta = layer.delta(self._shapes[part][name], strength)
            if place.transposed:
                _add_transposed(values, delta)
            else:
                values += delta
        largest = float(np.abs(values).max(initial=0))
        if not largest <= _LARGEST[weight.dtype]:  # NaN too
            raise CheckpointError(
                f"LoRA {layers[-1][0].label} takes {part} {name} to {largest:.3g}, beyond {weight.dtype}'s "
                f"{_LARGEST[weight.dtype]:g}; lower its strength, or export the bundle with weights fp32"
            )
        return to_stored(values, weight.dtype)

    def _shape(self, part: str, name: str) -> tuple[int, ...]:
        """In torch's layout."""
        place = self._maps[part][name]
        weight = self._weights[part].get(place.initializer)
        if weight is None or not _is_number(weight):
            raise BundleError(
                f"bundle {self._bundle.path} can't take a LoRA: {part}/model.onnx does not hold {place.initializer} as "
                "numbers, though its manifest says so; export it again"
            )
        return weight.shape[::-1] if place.transposed else weight.shape


def _add_transposed(values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
    """values += delta.T, in strips that stay in the processor's cache: as one, it takes three times as long. (A product
    with both sides transposed would give other last bits than the exporter's.)"""
    for first in range(0, len(delta), _STRIP):
        values[:, first : first + _STRIP] += delta[first : first + _STRIP].T


def _check_bundle(bundle: Bundle) -> None:
    """Raises BundleError for one whose weights can't be changed."""
    cure = "export it again, or fuse the LoRA as you export: vega-edge export MODEL -o BUNDLE --lora FILE"
    if bundle.manifest is None:
        raise BundleError(f"bundle {bundle.path} can't take a LoRA: another tool made it, without our manifest; {cure}")
    if str(bundle.manifest.weights) == "int8":
        raise BundleError(
            f"bundle {bundle.path} can't take a LoRA: its weights are int8; use one of fp32, fp16 or bf16"
        )
    if not bundle.manifest.parts.get("unet") or not bundle.manifest.parts["unet"].parameters:
        raise BundleError(
            f"bundle {bundle.path} can't take a LoRA: its manifest does not say where each weight is; {cure}"
        )


def _parts(bundle: Bundle) -> Iterator[tuple[str, Any]]:
    return iter(bundle.manifest.parts.items() if bundle.manifest else ())


def _is_number(weight: Weight) -> bool:
    return weight.dtype in _LARGEST
