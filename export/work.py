"""One part under way: its clock, its folder, and what all parts have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..manifest import Parameter
from . import graphs, onnx_edit, quantize
from .attention import save_attention
from .check import Arrays, compare, compare_pixels, tolerance
from .checkpoint import published_name
from .heap import give_back
from .openings import check_opens
from .packed import FLOATS, Packed
from .precision import Precision
from .report import PartReport
from .weights import place

Feeds = dict[str, torch.Tensor]
Case = tuple[Arrays, Arrays]  # what goes in, what torch gave for it
_ALWAYS_FLOAT32 = ("timestep", "text_embeds", "time_ids")  # see graphs.Denoiser


@dataclass(frozen=True)
class Exported:
    """activation_scale: see `rescale`; 1 where nothing was."""

    report: PartReport
    parameters: Mapping[str, Parameter]
    activation_scale: float = 1.0


class Work:
    def __init__(
        self,
        part: str,
        folder: Path,
        precision: Precision,
        announce: Callable[[str, str], None],
    ) -> None:
        self.part, self.precision, self.announce = part, precision, announce
        self.start = time.monotonic()
        self.graph = folder / part / "model.onnx"
        self.graph.parent.mkdir(exist_ok=True)
        self._begin("load")

    def _begin(self, phase: str) -> None:
        give_back()
        self.announce(self.part, phase)

    def export(
        self,
        packed: Packed,
        wrapper: torch.nn.Module,
        spec: graphs.GraphSpec,
        example: Feeds,
        ranges: Mapping[str, quantize.Range] | None = None,
    ) -> dict[str, Parameter]:
        """Trace, put the weights in, and write the graph. Returns where the weights that a LoRA may touch are."""
        self._begin("trace")
        kind = FLOATS[self.precision.arithmetic]
        example = {
            n: t.to(kind) if t.is_floating_point() and n not in _ALWAYS_FLOAT32 else t for n, t in example.items()
        }
        with packed.tracing(self.precision.arithmetic):
            traced = graphs.trace(self.part, wrapper, spec, example, self.precision.arithmetic)
        self._begin("write")
        onnx_edit.strip(traced.model)
        placed = place(
            traced.model, traced.parameters, packed.stored, self.precision.arithmetic,
            published=lambda name: published_name(self.part, name),
            mapped=() if "vae" in self.part else packed.matrices,
        )  # fmt: skip
        if ranges:
            quantize.make_integer(traced.model, placed.consumers, ranges)
        onnx_edit.float_ends(traced.model)
        onnx_edit.save(traced.model, self.graph)
        return placed.parameters

    def finish(
        self,
        parameters: Mapping[str, Parameter],
        cases: Sequence[Case],
        pixel_cases: Sequence[Case] = (),
        activation_scale: float = 1.0,
    ) -> Exported:
        """Compare what was written with torch's results. The module should be gone by now: the engine loads its own."""
        self._begin("check")
        dtype, levels = self.precision.dtype, None
        error = compare(self.part, self.graph, dtype, cases)
        if pixel_cases:
            levels = compare_pixels(self.part, self.graph.with_name("pixels.onnx"), dtype, pixel_cases)
        if dtype != "bf16":  # onnxruntime's CPU provider does not run it, so nothing here could check the second form
            if fused := save_attention(self.graph):
                compare(self.part, fused, dtype, cases[:1])
            if pixel_cases and (fused := save_attention(self.graph.with_name("pixels.onnx"))):
                compare_pixels(self.part, fused, dtype, pixel_cases[:1])
        check_opens(self.part, self.graph.parent, self.precision)
        size = sum(path.stat().st_size for path in self.graph.parent.iterdir())
        report = PartReport(
            self.part, dtype, size, time.monotonic() - self.start, error, tolerance(self.part, dtype), levels,
            self.precision.weights,
        )  # fmt: skip
        return Exported(report, parameters, activation_scale)


def forward(wrapper: torch.nn.Module, spec: graphs.GraphSpec, feeds: Feeds) -> Feeds:
    with torch.no_grad():
        outputs = wrapper(**feeds)
    return dict(zip(spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
