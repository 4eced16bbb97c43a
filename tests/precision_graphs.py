"""One convolution in each precision that export writes, made by the exporter's own pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from vega_edge.export import graphs, onnx_edit, quantize
from vega_edge.export.packed import FLOATS, Packed
from vega_edge.export.precision import Precision
from vega_edge.export.weights import place


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.model(torch.nn.functional.silu(x)))


def convolution(dtype: str, weights: str, folder: Path) -> tuple[Path, NDArray[Any], NDArray[Any]]:
    """The graph's path, an input for it, and what torch makes of that with the stored weights."""
    torch.manual_seed(0)
    precision = Precision(dtype, weights)
    packed = Packed("unet", nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3, padding=1)}), weights)
    module: Any = packed.module
    module.forward = lambda x: module["conv"](x)
    wrapper = _Wrapper(module)
    spec = graphs.GraphSpec({"x": ("batch", 16, "height", "width")}, {"y": ("batch", 16, "height", "width")})
    x = torch.randn(2, 16, 8, 12)
    with packed.computing():
        wanted = wrapper(x).numpy()
        ranges = quantize.observe(module, ["conv.weight"], lambda: wrapper(x)) if precision.integer else {}
    with packed.tracing(precision.arithmetic):
        example = {"x": torch.zeros(3, 16, 6, 10, dtype=FLOATS[precision.arithmetic])}
        traced = graphs.trace("unet", wrapper, spec, example, precision.arithmetic)
    onnx_edit.strip(traced.model)
    placed = place(traced.model, traced.parameters, packed.stored, precision.arithmetic, published=str)
    quantize.make_integer(traced.model, placed.consumers, ranges)
    onnx_edit.float_ends(traced.model)
    onnx_edit.save(traced.model, folder / "model.onnx")
    return folder / "model.onnx", x.numpy(), wanted
