"""The autoencoder's graphs: its encoder for img2img, its decoder to floats and to pixels, and the tiny one's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import graphs, onnx_edit, rescale, samples
from .checkpoint import Checkpoint, load_module
from .packed import Packed
from .precision import Precision
from .work import Exported, Feeds, Work, forward

_PROBE_SCALES = (1.0, 4.0)  # of the real latents, and of pure noise as wild as a bad sampler gives


class Autoencoders:
    """`notes`: what was decided on the way. sizes: of the latents to check with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: Precision,
        sizes: Sequence[samples.Size],
        announce: Callable[[str, str], None],
    ) -> None:
        # integers round what an eye sees at once: eight-bit weights, but float arithmetic
        self.precision = Precision(precision.arithmetic, precision.weights)
        self.checkpoint, self.folder, self.sizes, self.announce = checkpoint, folder, sizes, announce
        self.notes: list[str] = []
        self.scale = 2 ** (len(checkpoint.configs["vae"]["block_out_channels"]) - 1)  # pixels a latent pixel

    def encoder(self) -> tuple[Exported, list[torch.Tensor]]:
        """Also gives the check's pictures as latents, in the U-Net's scale."""
        part = "vae_encoder"
        work = Work(part, self.folder, self.precision, self.announce)
        packed = self._packed("vae", self.precision)
        vae: Any = packed.module
        wrapper, spec = graphs.Encoder(vae), graphs.encoder_spec(vae)
        feeds = [{"sample": samples.picture(size, self.scale)} for size in self.sizes]
        outputs: list[Feeds] = []
        with packed.computing():
            peak = rescale.largest_inner(vae.encoder, lambda: outputs.extend(forward(wrapper, spec, f) for f in feeds))
        packed, work.precision, scale = self._in_range(part, "vae", packed, peak, vae.encoder)
        latents = [samples.from_moments(o["latent_parameters"], self._scaling(vae)) for o in outputs]
        size = samples.traced_size(self.checkpoint.configs["unet"])
        pixels = [3, vae.config.in_channels, size.height * self.scale, size.width * self.scale]
        work.export(packed, graphs.Encoder(packed.module), spec, {"sample": torch.zeros(pixels)})
        del packed, vae
        cases = [(samples.to_numpy(f), samples.to_numpy(o)) for f, o in zip(feeds, outputs, strict=True)]
        return work.finish({}, cases, activation_scale=scale), latents

    def decoder(self, part: str, source: str, all_latents: Sequence[torch.Tensor]) -> Exported:
        """`part`: vae_decoder or tiny_vae_decoder; source: the checkpoint's vae or tiny_vae."""
        work = Work(part, self.folder, self.precision, self.announce)
        packed = self._packed(source, self.precision)
        vae: Any = packed.module
        scaling = self._scaling(vae)
        wrapper, spec = graphs.Decoder(vae), graphs.decoder_spec(vae)
        cases, pixel_cases = [], []
        with packed.computing():
            for latents in all_latents:
                feeds = {"latent_sample": samples.unscaled(latents, scaling)}
                outputs = forward(wrapper, spec, feeds)
                cases.append((samples.to_numpy(feeds), samples.to_numpy(outputs)))
                pixel_cases.append(({"latent_sample": latents.numpy()}, {"pixels": samples.pixels(outputs["sample"])}))
            # only fp16 has a range to stay in
            probes = [samples.unscaled(p, scaling) for p in _probes(all_latents)] if self._bounded else []
            peak = rescale.largest_inner(
                vae.decoder, lambda: [forward(wrapper, spec, {"latent_sample": p}) for p in probes]
            )
        packed, work.precision, scale = self._in_range(part, source, packed, peak, vae.decoder)
        size = samples.traced_size(self.checkpoint.configs["unet"])
        example = {"latent_sample": torch.zeros(size.batch, vae.config.latent_channels, size.height, size.width)}
        work.export(packed, graphs.Decoder(packed.module), spec, example)
        onnx_edit.save_pixels(work.graph, work.graph.with_name("pixels.onnx"), scaling)
        del packed, vae
        return work.finish({}, cases, pixel_cases, activation_scale=scale)

    def _scaling(self, vae: Any) -> dict[str, Any]:
        """With diffusers' defaults: older files have no scaling_factor."""
        return samples.scaling_of(vae.config, self.checkpoint.sdxl)

    @property
    def _bounded(self) -> bool:
        return self.precision.dtype == "fp16"

    def _packed(self, source: str, precision: Precision, scaled: tuple[str, float] | None = None) -> Packed:
        module = load_module(self.checkpoint, source)
        if scaled:
            rescale.rescale(getattr(module, scaled[0]), scaled[1])
        return Packed(source, module, precision.weights)

    def _in_range(
        self, part: str, source: str, packed: Packed, peak: float, half: Any
    ) -> tuple[Packed, Precision, float]:
        """What to export so that fp16 does not overflow: the module as it is, rescaled, or in fp32 arithmetic."""
        if not self._bounded:
            return packed, self.precision, 1.0
        forced = overflows(self.checkpoint.configs[source], self.checkpoint.sdxl)
        scale = rescale.scale_for(peak, forced) if source == "vae" else 1.0
        if scale == 1.0 and peak * rescale.HEADROOM_UNSCALED <= rescale.LARGEST:
            return packed, self.precision, 1.0
        if source == "vae":
            name = "encoder" if part == "vae_encoder" else "decoder"
            self.notes.append(
                f"{part}: inner values are scaled by {scale:g} to stay in fp16's range; results are the same"
            )
            return self._packed(source, self.precision, (name, scale)), self.precision, scale
        self.notes.append(f"{part} computes in fp32: its inner values reach {peak:.3g}, too near fp16's 65504")
        return packed, Precision("fp32", self.precision.weights), 1.0


def overflows(config: Mapping[str, Any], sdxl: bool) -> bool:
    """Does its configuration say that it overflows in fp16 (force_upcast)?

    Where it says nothing, diffusers' SDXL pipeline takes it for true, and its SD pipeline never asks.
    """
    return bool(config.get("force_upcast", sdxl)) and config.get("_class_name") != "AutoencoderTiny"


def _probes(all_latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    noise = torch.randn(all_latents[0].shape, generator=torch.Generator().manual_seed(0))
    return [*(all_latents[0] * s for s in _PROBE_SCALES), *(noise * s for s in _PROBE_SCALES)]
