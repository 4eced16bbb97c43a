"""A torch module whose weights are kept as they will be stored, and widened to float32 one layer at a time.

So one copy of the weights is all that an export holds, in their final size; and the results that the exported graph
is compared with come from the very numbers that it stores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ExportError

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_INT8_ELEMENTS = 1024  # smaller matrices are stored in half precision: scales and nodes would take what eight bits save
_QUANTIZED = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Stored:
    """One parameter. scale: float32[shape[0]] where `data` is int8, its value data * scale along the first axis."""

    data: torch.Tensor
    scale: torch.Tensor | None = None

    def widened(self, into: torch.Tensor) -> torch.Tensor:
        """The value in float32, written to `into`."""
        into.copy_(self.data)
        return into if self.scale is None else into.mul_(self.scale.view(-1, *[1] * (self.data.ndim - 1)))


class _Stack:
    """Float32 memory for the layers under way, taken once: made and freed for each layer, it would fragment the heap by
    as much again as the weights take."""

    def __init__(self, elements: int) -> None:
        self._memory, self._top = torch.empty(elements), 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        start, self._top = self._top, self._top + like.numel()
        if self._top > self._memory.numel():  # a layer with weights of its own inside another such layer
            return torch.empty(like.shape)
        return self._memory[start : self._top].view(like.shape)

    def give_back(self, like: torch.Tensor) -> None:
        self._top -= like.numel()


def in_eight_bits(owner: nn.Module, value: torch.Tensor) -> bool:
    """Whether `value`, a parameter of `owner`, is stored as int8 where weights are: matrices, kernels and embeddings of
    1,024 numbers or more. Biases and norms are vectors, which have no axis to be scaled along."""
    return isinstance(owner, _QUANTIZED) and value.ndim > 1 and value.numel() >= _INT8_ELEMENTS


def quantized(weight: torch.Tensor) -> Stored:
    """Symmetric int8, one scale for each slice along the first axis, from that slice's largest value."""
    flat = weight.flatten(1).float()
    low, high = flat.aminmax(dim=1)
    scale = (torch.maximum(-low, high) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return Stored((flat / scale[:, None]).round_().to(torch.int8).view(weight.shape), scale)


class Packed:
    """Takes `module`'s parameters: they are in `stored` by name, and the module holds placeholders without memory.

    prepare: what is done to each parameter (by name) before it is stored, such as fusing a LoRA. `changed`: how many of
    them storage in `weights` (fp32, fp16, bf16, int8) has rounded.
    """

    def __init__(
        self,
        part: str,
        module: nn.Module,
        weights: str,
        prepare: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
    ) -> None:
        self.module, self.changed = module.eval(), 0
        self.stored: dict[str, Stored] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for prefix, owner in module.named_modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                full = f"{prefix}.{name}" if prefix else name
                self._owners[full] = owner, name
                self.stored[full] = self._store(part, full, owner, prepare(full, parameter.detach()), weights)
                setattr(owner, name, _placeholder(parameter, torch.float32))
                del parameter

    def _store(self, part: str, name: str, owner: nn.Module, value: torch.Tensor, weights: str) -> Stored:
        if not _finite(value):
            raise ExportError(f"{part}: {name} holds values that are not finite; fetch the checkpoint again")
        if weights == "int8" and in_eight_bits(owner, value):
            return quantized(value)
        kept = value.to(FLOATS["fp16" if weights == "int8" else weights]).contiguous()
        if kept.dtype != value.dtype and not _finite(kept):
            worst = float(value.abs().max())
            raise ExportError(
                f"{part}: {name} holds {worst:.3g}, beyond fp16's 65504; export with weights fp32 or bf16"
            )
        self.changed += kept.dtype != value.dtype and not torch.equal(kept.to(value.dtype), value)
        return Stored(kept)

    @property
    def matrices(self) -> list[str]:
        """The weights that a LoRA may touch: those of linear layers and 2-D convolutions."""
        return [
            full
            for full, (owner, name) in self._owners.items()
            if name == "weight" and isinstance(owner, (nn.Linear, nn.Conv2d))
        ]

    @property
    def wide_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return sum(stored.data.numel() * 4 for stored in self.stored.values())

    @contextlib.contextmanager
    def computing(self, keep: bool = False) -> Iterator[nn.Module]:
        """The module computes in float32 inside the block: each layer is widened when called, and narrowed after.

        keep: every layer is widened once and stays so until the block ends, which takes `wide_bytes` of memory and pays
        for a module that runs many times. The results are the same.
        """
        with torch.no_grad(), self._widened() if keep else self._widened_by_layer():
            yield self.module

    @contextlib.contextmanager
    def _widened(self) -> Iterator[None]:
        try:
            for full, (owner, name) in self._owners.items():
                wide = self.stored[full].widened(torch.empty(self.stored[full].data.shape))
                setattr(owner, name, nn.Parameter(wide, requires_grad=False))
            yield
        finally:
            self._empty(torch.float32)

    @contextlib.contextmanager
    def _widened_by_layer(self) -> Iterator[None]:
        by_owner: dict[nn.Module, list[tuple[str, str]]] = {}
        for full, (owner, name) in self._owners.items():
            by_owner.setdefault(owner, []).append((full, name))
        room = _Stack(max(sum(self.stored[full].data.numel() for full, _ in own) for own in by_owner.values()))

        def widen(owner: nn.Module, _: Any) -> None:
            for full, name in by_owner[owner]:
                wide = self.stored[full].widened(room.take(self.stored[full].data))
                setattr(owner, name, nn.Parameter(wide, requires_grad=False))

        def narrow(owner: nn.Module, *_: Any) -> None:
            for full, name in by_owner[owner]:
                room.give_back(self.stored[full].data)
                setattr(owner, name, _placeholder(self.stored[full].data, torch.float32))

        hooks = [owner.register_forward_pre_hook(widen) for owner in by_owner]
        hooks += [owner.register_forward_hook(narrow) for owner in by_owner]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def tracing(self, arithmetic: str) -> Iterator[nn.Module]:
        """The module has placeholders of the arithmetic's type inside the block: shapes without numbers."""
        self._empty(FLOATS[arithmetic])
        try:
            yield self.module
        finally:
            self._empty(torch.float32)

    def _empty(self, dtype: torch.dtype) -> None:
        for full, (owner, name) in self._owners.items():
            setattr(owner, name, _placeholder(self.stored[full].data, dtype))


def _finite(tensor: torch.Tensor) -> bool:
    """The largest magnitude is not finite where any value is not; it is found faster than each is looked at."""
    return tensor.numel() == 0 or bool(torch.isfinite(tensor.abs().max()))


def _placeholder(like: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(like.shape), requires_grad=False)
