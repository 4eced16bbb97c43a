"""torch modules to ONNX graphs: wrappers that fix the order of inputs and outputs, and the call of torch's exporter.

Names of inputs and outputs are optimum's. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ..collector import uncollected
from ..errors import ExportError
from .quiet import quiet
from .simplify import simplify
from .tokenizer_files import TOKENS

OPSET = 18  # the last at which attention and GroupNorm are decomposed, which is what TensorRT-RTX builds
OPSET_BF16 = 22  # the first at which convolutions and instance normalization may be bfloat16
ROOT = "model"  # the wrapped module's attribute: what every parameter's name in the graph begins with

Axes = tuple[int | str, ...]


class TextEncoder(nn.Module):
    """input_ids int64[batch, 77] -> last_hidden_state, pooler_output (or text_embeds first), hidden_states.0 ..."""

    def __init__(self, model: nn.Module, projection: bool) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model(input_ids, output_hidden_states=True)
        if self.projection:
            return out.text_embeds, out.last_hidden_state, *out.hidden_states
        return out.last_hidden_state, out.pooler_output, *out.hidden_states


class Denoiser(nn.Module):
    """sample, timestep, encoder_hidden_states (, text_embeds, time_ids) -> out_sample.

    text_embeds, time_ids and timestep are float32 whatever the weights are: their concatenation with the float32
    sinusoids would mix two precisions, which ONNX forbids; the module itself casts after it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class Encoder(nn.Module):
    """sample in [-1, 1] -> latent_parameters: mean and logarithm of the variance, one after the other (axis 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.model.encode(sample).latent_dist.parameters


class Decoder(nn.Module):
    """latent_sample (already divided by the scaling factor) -> sample in [-1, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]


@dataclass(frozen=True)
class GraphSpec:
    """What goes in and out: inputs by name with axes (str: dynamic, int: fixed), outputs likewise."""

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def text_encoder_spec(encoder: TextEncoder) -> GraphSpec:
    config: Any = encoder.model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    hidden: Axes = ("batch", TOKENS, width)
    first: dict[str, Axes] = {"last_hidden_state": hidden, "pooler_output": ("batch", width)}
    if encoder.projection:
        first = {"text_embeds": ("batch", config.projection_dim), "last_hidden_state": hidden}
    return GraphSpec(
        {"input_ids": ("batch", TOKENS)}, {**first, **{f"hidden_states.{i}": hidden for i in range(layers + 1)}}
    )


def denoiser_spec(unet: nn.Module) -> GraphSpec:
    config = unet.config
    channels = config.in_channels
    inputs: dict[str, Axes] = {
        "sample": ("batch", channels, "height", "width"),
        "timestep": (1,),
        "encoder_hidden_states": ("batch", "sequence_length", config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": ("batch", pooled), "time_ids": ("batch", 6)}
    return GraphSpec(inputs, {"out_sample": ("batch", config.out_channels, "height", "width")})


def encoder_spec(vae: nn.Module) -> GraphSpec:
    return GraphSpec(
        {"sample": ("batch", vae.config.in_channels, "image_height", "image_width")},
        {"latent_parameters": ("batch", 2 * vae.config.latent_channels, "height", "width")},
    )


def decoder_spec(vae: nn.Module) -> GraphSpec:
    return GraphSpec(
        {"latent_sample": ("batch", vae.config.latent_channels, "height", "width")},
        {"sample": ("batch", vae.config.out_channels, "image_height", "image_width")},
    )


@dataclass(frozen=True)
class Traced:
    """A graph without numbers; `parameters`: the inputs that stand for the module's parameters, by their names in it."""

    model: ir.Model
    parameters: Mapping[str, ir.Value]


def trace(
    part: str, wrapper: nn.Module, spec: GraphSpec, feeds: Mapping[str, torch.Tensor], arithmetic: str = "fp32"
) -> Traced:
    """Trace with `feeds` as the example and translate. ExportError if torch's exporter refuses or fixes an axis.

    While the graph is optimized its parameters are inputs: nothing can be folded into them or made of them, so they
    need no numbers here (see `packed.Packed.tracing`) and keep their names.
    """
    dynamic = {
        name: {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(axes) if isinstance(size, str)}
        for name, axes in spec.inputs.items()
    }
    opset = OPSET_BF16 if arithmetic == "bf16" else OPSET
    try:
        # the collector would look through a trace's million objects again and again, and find nothing
        with quiet(), torch.no_grad(), uncollected():
            program = torch.onnx.export(
                wrapper.eval(), (), kwargs=dict(feeds), input_names=list(spec.inputs), output_names=list(spec.outputs),
                opset_version=opset, dynamo=True, dynamic_shapes=dynamic, optimize=False, verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as e:
        cause = e.__cause__ or e
        raise ExportError(f"{part}: torch's exporter refused it: {type(cause).__name__}: {_first_line(cause)}") from e
    model: ir.Model = program.model
    if model.opset_imports.get("") != opset:
        raise ExportError(f"{part}: torch's exporter wrote opset {model.opset_imports.get('')}, needed is {opset}")
    parameters = _parameters_to_inputs(model.graph, {name for name, _ in wrapper.named_parameters()})
    with quiet():
        simplify(model)
    name_axes(model, spec)
    used = {name: value for name, value in parameters.items() if value.uses()}
    for value in parameters.values():
        if not value.uses():
            model.graph.inputs.remove(value)
    return Traced(model, {name.removeprefix(f"{ROOT}."): value for name, value in used.items()})


def _parameters_to_inputs(graph: ir.Graph, names: set[str]) -> dict[str, ir.Value]:
    found = {}
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        found[name] = value
    return found


def name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Replace the exporter's symbols (s23, 4*(((s30 - 1)//4)) + 4, ...) by the axes' names."""
    for values, axes in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value in values:
            if value.name in axes:  # not a parameter
                value.shape = ir.Shape(axes[value.name])


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
