"""A convolution and an attention layer in each precision that export writes, made by the exporter's own pieces."""

from __future__ import annotations

from collections.abc import Callable
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
    def __init__(self, model: nn.Module, run: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.model, x)


def convolution(dtype: str, weights: str, folder: Path) -> tuple[Path, NDArray[Any], NDArray[Any]]:
    """The graph's path, an input for it, and what torch makes of that with the stored weights."""
    torch.manual_seed(0)
    silu = torch.nn.functional.silu
    wrapper = nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3, padding=1)}), lambda model, x: silu(model["conv"](silu(x)))
    axes = ("batch", 16, "height", "width")
    return _exported(*wrapper, Precision(dtype, weights), axes, (2, 16, 8, 12), (3, 16, 6, 10), folder)


def attention_layer(
    folder: Path, tokens: int, heads: int, width: int, dtype: str = "int8", weights: str = "int8"
) -> tuple[Path, dict[str, NDArray[Any]], NDArray[Any]]:
    """Self-attention with its four linear layers, as in a U-Net: the graph's path, feeds, and what torch gives for them."""
    torch.manual_seed(0)
    channels = heads * width
    layers = nn.ModuleDict(
        {name: nn.Linear(channels, channels, bias=name == "to_out") for name in ("to_q", "to_k", "to_v", "to_out")}
    )

    def attend(model: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (model[f"to_{n}"](x).view(x.shape[0], -1, heads, width).transpose(1, 2) for n in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return model["to_out"](y.transpose(1, 2).reshape(x.shape[0], -1, channels))  # type: ignore[no-any-return]

    path, x, wanted = _exported(
        layers, attend, Precision(dtype, weights), ("batch", "tokens", channels), (2, tokens, channels),
        (3, 24, channels), folder,
    )  # fmt: skip
    return path, {"x": x}, wanted


def _exported(
    module: nn.Module,
    run: Callable[[Any, torch.Tensor], torch.Tensor],
    precision: Precision,
    axes: graphs.Axes,
    shape: tuple[int, ...],
    traced_shape: tuple[int, ...],
    folder: Path,
) -> tuple[Path, NDArray[Any], NDArray[Any]]:
    packed = Packed("unet", module, precision.weights)
    wrapper = _Wrapper(packed.module, run)
    spec = graphs.GraphSpec({"x": axes}, {"y": axes})
    x = torch.randn(*shape)
    names = [name for name, _ in packed.module.named_parameters() if name.endswith(".weight")]
    with packed.computing():
        wanted = wrapper(x).numpy()
        ranges = quantize.observe(packed.module, names, lambda: wrapper(x)) if precision.integer else {}
    with packed.tracing(precision.arithmetic):
        example = {"x": torch.zeros(*traced_shape, dtype=FLOATS[precision.arithmetic])}
        traced = graphs.trace("unet", wrapper, spec, example, precision.arithmetic)
    onnx_edit.strip(traced.model)
    placed = place(traced.model, traced.parameters, packed.stored, precision.arithmetic, published=str)
    quantize.make_integer(traced.model, placed.consumers, ranges)
    onnx_edit.float_ends(traced.model)
    onnx_edit.save(traced.model, folder / "model.onnx")
    return folder / "model.onnx", x.numpy(), wanted
