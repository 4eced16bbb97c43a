"""Integer arithmetic: what each layer's values reach on real denoising inputs, and the nodes that round them to int8.

Weights are in eight bits already (`packed.quantized`). Written here and not left to onnxruntime.quantization, which
runs the whole float32 graph with every inner value as an output, several times the model's memory; torch's hooks see the
same values one layer at a time. Symmetric int8, because TensorRT takes no other zero point than 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

STEPS = 10
# Small, and what they lose is in every value after them; they keep float arithmetic with eight-bit weights.
_KEPT = ("conv_in", "conv_out", "time_embedding.", "add_embedding.", "time_emb_proj")


class Range(NamedTuple):
    """The largest absolute value of a layer's input, and of its output."""

    input: float
    output: float


def observe(module: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> dict[str, Range]:
    """Ranges of the layers that have the weights `names`, while `run()` runs the module."""
    seen: dict[str, Range] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            before = seen.get(name, Range(0.0, 0.0))
            got = _largest(inputs[0]), _largest(output)
            seen[name] = Range(max(before.input, got[0]), max(before.output, got[1]))

        return hook

    modules = dict(module.named_modules())
    hooks = [
        modules[name.removesuffix(".weight")].register_forward_hook(watch(name))
        for name in names
        if not any(kept in name for kept in _KEPT)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _largest(values: torch.Tensor) -> float:
    """The largest absolute value, without a copy of them."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def denoise(
    predict: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    scheduler: Mapping[str, Any],
    cases: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> None:
    """Walk from noise to a picture as a user's request does, for each case: latents (for their shape), other feeds."""
    from diffusers import EulerDiscreteScheduler

    for latents, feeds in cases:
        steps = EulerDiscreteScheduler.from_config(dict(scheduler))
        steps.set_timesteps(min(STEPS, steps.config.num_train_timesteps))
        x = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * steps.init_noise_sigma
        for t in steps.timesteps:
            sample = steps.scale_model_input(x, t)
            x = steps.step(predict({"sample": sample, "timestep": t.float().reshape(1), **feeds}), t, x).prev_sample


def make_integer(model: ir.Model, consumers: Mapping[str, Sequence[ir.Node]], ranges: Mapping[str, Range]) -> None:
    """Round the input of every layer that was observed, and a convolution's output: onnxruntime has no integer
    convolution that gives floats."""
    rounder = _Rounder(model.graph)
    for name, nodes in consumers.items():
        if name not in ranges:
            continue
        for node in nodes:
            if node.op_type not in ("Conv", "MatMul", "Gemm"):
                continue
            source = node.inputs[0]
            if source is not None:
                node.replace_input_with(0, rounder.rounded(source, ranges[name].input))
            if node.op_type == "Conv":
                rounder.round_output(node.outputs[0], ranges[name].output, node)


class _Rounder:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._done: dict[tuple[int, float], ir.Value] = {}
        self._zero = self._constant("int8_zero", np.array(0, np.int8))
        self._count = 0

    def rounded(self, value: ir.Value, largest: float) -> ir.Value:
        key = id(value), largest
        if key not in self._done:  # to_q, to_k and to_v read one value
            pair = self._pair(value, largest)
            producer = value.producer()
            for node in reversed(pair):
                if producer is None:
                    self.graph.insert_before(next(iter(self.graph)), node)
                else:
                    self.graph.insert_after(producer, node)
            self._done[key] = pair[1].outputs[0]
        return self._done[key]

    def round_output(self, value: ir.Value, largest: float, after: ir.Node) -> None:
        users = [(use.node, use.idx) for use in value.uses()]
        pair = self._pair(value, largest)
        for node in reversed(pair):
            self.graph.insert_after(after, node)
        for node, index in users:
            node.replace_input_with(index, pair[1].outputs[0])

    def _pair(self, value: ir.Value, largest: float) -> tuple[ir.Node, ir.Node]:
        self._count += 1
        name = f"int8_{self._count}"
        scale = self._constant(f"{name}.scale", np.array(max(largest, 1e-12) / 127, np.float32))
        down = ir.node("QuantizeLinear", [value, scale, self._zero], name=f"{name}.quantize")
        up = ir.node("DequantizeLinear", [down.outputs[0], scale, self._zero], name=f"{name}.dequantize")
        down.outputs[0].name, up.outputs[0].name = name, f"{name}.float32"
        return down, up

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value
