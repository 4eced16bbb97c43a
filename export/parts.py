"""Each part of a checkpoint to ONNX: load, fuse, round, trace, edit, write, compare with torch. One part at a time.

The order matters: what the text encoders and the autoencoder give are the U-Net's real inputs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ExportError
from ..lora import LoraLayer
from ..manifest import Parameter
from . import graphs, onnx_edit, samples
from .check import Arrays, compare, compare_pixels, tolerance
from .checkpoint import Checkpoint, load_module, published_name
from .report import PartReport
from .tokenizer_files import TOKENS, load_tokenizer, token_ids, write_tokenizer

PHASES = ("load", "trace", "write", "check")
Feeds = dict[str, torch.Tensor]
Case = tuple[Arrays, Arrays]  # what goes in, what torch gave for it
_ALWAYS_FLOAT32 = ("timestep", "text_embeds", "time_ids")  # see graphs.Denoiser


@dataclass(frozen=True)
class Precision:
    """dtype: of the arithmetic; weights: of the storage. Each 'fp32' or 'fp16'."""

    dtype: str
    weights: str


@dataclass(frozen=True)
class Exported:
    report: PartReport
    parameters: Mapping[str, Parameter]


class PartsExporter:
    """Exports a checkpoint's parts into `folder`; keeps what one part owes the next.

    `notes`: what was decided on the way, to tell the user.
    `layers`: part -> weight name -> the LoRA layers to fuse into it, each with its strength.
    `announce(part, phase)` is called as each phase of PHASES begins.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: Precision,
        layers: Mapping[str, Mapping[str, Sequence[tuple[LoraLayer, float]]]],
        announce: Callable[[str, str], None],
    ) -> None:
        self.checkpoint, self.folder, self.precision = checkpoint, folder, precision
        self.layers, self.announce = layers, announce
        self.notes: list[str] = []
        self._sizes = samples.latent_sizes(checkpoint.configs["unet"])
        self._text: list[Feeds] = [{} for _ in self._sizes]  # per case, the U-Net's inputs that come from text
        self._latents: list[torch.Tensor] = []  # per case, in the U-Net's scale
        self._scale = 1  # pixels per latent pixel

    def run(self) -> dict[str, Exported]:
        encoders = [part for part in self.checkpoint.parts if part.startswith("text_encoder")]
        done = {part: self._text_encoder(part) for part in encoders}
        done["vae_decoder"] = self._vae_decoder()
        done["unet"] = self._unet()
        return done

    def _text_encoder(self, part: str) -> Exported:
        work = _Work(self, part, self.precision)
        source = self.checkpoint.path / part.replace("text_encoder", "tokenizer")
        tokenizer = load_tokenizer(source)
        write_tokenizer(source, self.folder / source.name, tokenizer)
        wrapper = graphs.TextEncoder(self._load(part, self.precision), projection=part == "text_encoder_2")
        spec = graphs.text_encoder_spec(wrapper)
        # SDXL takes both encoders' last but one hidden state, SD the last one after the final norm
        layers = wrapper.model.config.num_hidden_layers
        states = f"hidden_states.{layers - 1}" if self.checkpoint.sdxl else "last_hidden_state"
        cases = []
        for prompts, text in zip(samples.PROMPTS, self._text, strict=True):
            feeds = {"input_ids": token_ids(tokenizer, prompts)}
            outputs = _forward(wrapper, spec, feeds)
            cases.append((samples.to_numpy(feeds), samples.to_numpy(outputs)))
            before = [text["encoder_hidden_states"]] if "encoder_hidden_states" in text else []
            text["encoder_hidden_states"] = torch.cat([*before, outputs[states]], -1)
            text |= {"text_embeds": outputs["text_embeds"]} if wrapper.projection else {}
        example = {"input_ids": torch.zeros(3, TOKENS, dtype=torch.int64)}
        parameters = work.export(wrapper, spec, example)
        del wrapper
        return work.finish(parameters, cases)

    def _vae_decoder(self) -> Exported:
        part = "tiny_vae" if "tiny_vae" in self.checkpoint.parts else "vae"
        precision = decoder_precision(self.precision, self.checkpoint.configs[part], self.checkpoint.sdxl)
        if precision != self.precision:
            self.notes.append(
                "vae_decoder computes in fp32: its configuration says force_upcast (it overflows in fp16)"
            )
        work = _Work(self, "vae_decoder", precision)
        vae = load_module(self.checkpoint, "vae", {})
        self._scale = 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.no_grad():
            pictures = [samples.picture(size, self._scale) for size in self._sizes]
            self._latents = [vae.encode(p).latent_dist.mean * vae.config.scaling_factor for p in pictures]
        vae = self._load(part, precision)
        config = dict(vae.config)  # with diffusers' defaults: older files say no scaling_factor
        wrapper, spec = graphs.Decoder(vae), graphs.decoder_spec(vae)
        cases, pixel_cases = [], []
        for latents in self._latents:
            feeds = {"latent_sample": samples.unscaled(latents, config)}
            outputs = _forward(wrapper, spec, feeds)
            cases.append((samples.to_numpy(feeds), samples.to_numpy(outputs)))
            pixel_cases.append(({"latent_sample": latents.numpy()}, {"pixels": samples.pixels(outputs["sample"])}))
        size = samples.traced_size(self.checkpoint.configs["unet"])
        example = {"latent_sample": torch.zeros(size.batch, vae.config.latent_channels, size.height, size.width)}
        work.export(wrapper, spec, example)
        onnx_edit.save_pixels(work.graph, work.graph.with_name("pixels.onnx"), config)
        del wrapper, vae
        return work.finish({}, cases, pixel_cases)

    def _unet(self) -> Exported:
        work = _Work(self, "unet", self.precision)
        unet = self._load("unet", self.precision)
        wrapper, spec = graphs.Denoiser(unet), graphs.denoiser_spec(unet)
        scheduler = self.checkpoint.scheduler
        cases = []
        for size, latents, text, t in zip(self._sizes, self._latents, self._text, samples.TIMESTEPS, strict=True):
            feeds = {"sample": samples.noised(latents, t, scheduler), "timestep": torch.tensor([t]), **text}
            if "text_embeds" in spec.inputs:
                feeds["time_ids"] = samples.size_conditioning(size, self._scale)
            cases.append((samples.to_numpy(feeds), samples.to_numpy(_forward(wrapper, spec, feeds))))
        size = samples.traced_size(self.checkpoint.configs["unet"])
        names = {"batch": size.batch, "height": size.height, "width": size.width, "sequence_length": TOKENS}
        example = {n: torch.ones([names.get(a, a) for a in axes]) for n, axes in spec.inputs.items()}
        parameters = work.export(wrapper, spec, example)
        del wrapper, unet
        return work.finish(parameters, cases)

    def _load(self, part: str, precision: Precision) -> nn.Module:
        """The module in float32, its LoRA fused and, if it will be stored in half precision, its weights rounded."""
        module = load_module(self.checkpoint, part, self.layers.get(part, {}))
        if precision.weights == "fp16":
            changed = round_to_half(part, module)
            if changed:
                self.notes.append(
                    f"{part}: {changed} weights were rounded to fp16 (LoRA, or a checkpoint of higher precision)"
                )
        return module


class _Work:
    """One part under way: its clock, its folder, and the phases all parts share."""

    def __init__(self, exporter: PartsExporter, part: str, precision: Precision) -> None:
        self.exporter, self.part, self.precision = exporter, part, precision
        self.start = time.monotonic()
        self.graph = exporter.folder / part / "model.onnx"
        self.graph.parent.mkdir(exist_ok=True)
        exporter.announce(part, "load")

    def export(self, wrapper: nn.Module, spec: graphs.GraphSpec, example: Feeds) -> dict[str, Parameter]:
        """Trace, edit and write the graph. Returns where its weights are."""
        self.exporter.announce(self.part, "trace")
        if self.precision.dtype == "fp16":
            wrapper.half()
            example = {
                n: t.half() if t.is_floating_point() and n not in _ALWAYS_FLOAT32 else t for n, t in example.items()
            }
        model = graphs.export_graph(self.part, wrapper, spec, example)
        self.exporter.announce(self.part, "write")
        onnx_edit.strip(model)
        weights = {} if self.part == "vae_decoder" else _matrices_and_kernels(self.part, getattr(wrapper, graphs.ROOT))
        parameters = onnx_edit.name_weights(model, weights, self._rename)
        if self.precision == Precision("fp32", "fp16"):
            onnx_edit.store_half(model)
        onnx_edit.save(model, self.graph)
        return parameters

    def finish(
        self, parameters: Mapping[str, Parameter], cases: Sequence[Case], pixel_cases: Sequence[Case] = ()
    ) -> Exported:
        """Compare what was written with torch's results. The module should be gone by now: the engine loads its own."""
        gc.collect()
        self.exporter.announce(self.part, "check")
        dtype, levels = self.precision.dtype, None
        error = compare(self.part, self.graph, dtype, cases)
        if pixel_cases:
            levels = compare_pixels(self.graph.with_name("pixels.onnx"), dtype, pixel_cases)
        size = sum(path.stat().st_size for path in self.graph.parent.iterdir())
        seconds = time.monotonic() - self.start
        return Exported(
            PartReport(self.part, dtype, size, seconds, error, tolerance(self.part, dtype), levels), parameters
        )

    def _rename(self, initializer: str) -> str:
        inner = initializer.removeprefix(f"{graphs.ROOT}.")
        return initializer if inner == initializer else published_name(self.part, inner)


def decoder_precision(precision: Precision, config: Mapping[str, Any], sdxl: bool) -> Precision:
    """fp32 arithmetic for autoencoders that overflow in half precision, as their configuration says (force_upcast).

    Where it says nothing, diffusers' SDXL pipeline takes it for true, and its SD pipeline never asks.
    """
    if precision.dtype == "fp16" and config.get("force_upcast", sdxl):
        return Precision("fp32", precision.weights)
    return precision


def round_to_half(part: str, module: nn.Module) -> int:
    """Round every weight to the nearest float16 (staying float32). Returns how many tensors that changed.

    Done before anything is compared, so that the comparison with torch has the very weights that are stored.
    """
    changed = 0
    for name, parameter in module.named_parameters():
        half = parameter.data.half()
        if not torch.isfinite(half).all():
            worst = float(parameter.data.abs().max())
            raise ExportError(f"{part}: {name} holds {worst:.3g}, beyond fp16's 65504; export with weights fp32")
        rounded = half.float()
        changed += not torch.equal(rounded, parameter.data)
        parameter.data = rounded
    return changed


def _matrices_and_kernels(part: str, module: nn.Module) -> dict[str, NDArray[Any]]:
    """The weights a LoRA may touch, by their published names."""
    modules = ((name, m) for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return {published_name(part, f"{name}.weight"): m.weight.detach().numpy() for name, m in modules}


def _forward(wrapper: nn.Module, spec: graphs.GraphSpec, feeds: Feeds) -> Feeds:
    with torch.no_grad():
        outputs = wrapper(**feeds)
    return dict(zip(spec.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
