"""Each part of a checkpoint to ONNX: load, fuse, store, trace, write, compare with torch. One part at a time.

The order matters: what the text encoders and the autoencoder give are the U-Net's real inputs. They are kept with
each finished part, so that an export that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import ExportError
from ..lora import LoraLayer
from . import graphs, quantize, samples
from .autoencoders import Autoencoders
from .checkpoint import Checkpoint, fused, load_module, published_name
from .needs import bundle_parts, fits_in_memory
from .packed import Packed
from .precision import Precision
from .records import Records
from .tokenizer_files import TOKENS, load_tokenizer, token_ids, write_tokenizer
from .work import Exported, Feeds, Work, forward

PHASES = ("load", "trace", "write", "check")
Layers = Mapping[str, Mapping[str, Sequence[tuple[LoraLayer, float]]]]


class PartsExporter:
    """Exports a checkpoint's parts into `folder`; keeps what one part owes the next.

    `notes`: what was decided on the way, to tell the user.
    `layers`: part -> weight name -> the LoRA layers to fuse into it, each with its strength.
    `vae`: what vae_decoder is, "full" or "tiny"; a tiny one that is not goes beside it.
    `announce(part, phase)` is called as each phase of PHASES begins; not for parts that `records` has finished already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: Precision,
        layers: Layers,
        announce: Callable[[str, str], None],
        records: Records,
        vae: str = "full",
    ) -> None:
        self.checkpoint, self.folder, self.precision, self.vae = checkpoint, folder, precision, vae
        self.layers, self.announce, self.records = layers, announce, records
        self.notes: list[str] = []
        sizes = samples.latent_sizes(checkpoint.configs["unet"])
        # integers round the text and the picture too much; there only the storage is in eight bits
        self._float = Precision(precision.arithmetic, precision.weights)
        self._autoencoders = Autoencoders(checkpoint, folder, precision, sizes, announce)
        self._scale, self._sizes = self._autoencoders.scale, sizes
        self._text: list[Feeds] = [{} for _ in sizes]  # per case, the U-Net's inputs that come from text
        self._latents: list[torch.Tensor] = []  # per case, in the U-Net's scale

    def run(self) -> dict[str, Exported]:
        done = {part: self._finished(part) or self._made(part) for part in bundle_parts(self.checkpoint, self.vae)}
        self.notes += self._autoencoders.notes
        return done

    def _finished(self, part: str) -> Exported | None:
        found = self.records.load(part)
        if found is None:
            return None
        exported, handed = found
        self.notes.append(f"{part} is from an export of the same that was interrupted")
        self._receive(part, handed)
        return exported

    def _made(self, part: str) -> Exported:
        handed: Feeds = {}
        if part.startswith("text_encoder"):
            exported, handed = self._text_encoder(part)
        elif part == "vae_encoder":
            exported, latents = self._autoencoders.encoder()
            handed = {f"latents.{i}": case for i, case in enumerate(latents)}
        elif part == "unet":
            exported = self._unet()
        else:
            tiny = part == "tiny_vae_decoder" or self.vae == "tiny"
            exported = self._autoencoders.decoder(part, "tiny_vae" if tiny else "vae", self._latents)
        self._receive(part, handed)
        self.records.save(part, exported, handed)
        return exported

    def _receive(self, part: str, handed: Feeds) -> None:
        if part == "vae_encoder":
            self._latents = [handed[f"latents.{i}"] for i in range(len(self._sizes))]
        for i, text in enumerate(self._text):
            if (states := handed.get(f"states.{i}")) is not None:
                before = [text["encoder_hidden_states"]] if "encoder_hidden_states" in text else []
                text["encoder_hidden_states"] = torch.cat([*before, states], -1)
            if (pooled := handed.get(f"pooled.{i}")) is not None:
                text["text_embeds"] = pooled

    def _text_encoder(self, part: str) -> tuple[Exported, Feeds]:
        work = Work(part, self.folder, self._float, self.announce)
        source = self.checkpoint.path / part.replace("text_encoder", "tokenizer")
        tokenizer = load_tokenizer(source)
        write_tokenizer(source, self.folder / source.name, tokenizer)
        packed = self._load(part)
        wrapper = graphs.TextEncoder(packed.module, projection=part == "text_encoder_2")
        spec = graphs.text_encoder_spec(wrapper)
        # SDXL takes both encoders' last but one hidden state, SD the last one after the final norm
        layers = wrapper.model.config.num_hidden_layers
        states = f"hidden_states.{layers - 1}" if self.checkpoint.sdxl else "last_hidden_state"
        cases, handed = [], {}
        with packed.computing():
            for i, prompts in enumerate(samples.PROMPTS):
                feeds = {"input_ids": token_ids(tokenizer, prompts)}
                outputs = forward(wrapper, spec, feeds)
                cases.append((samples.to_numpy(feeds), samples.to_numpy(outputs)))
                handed[f"states.{i}"] = outputs[states]
                handed |= {f"pooled.{i}": outputs["text_embeds"]} if wrapper.projection else {}
        example = {"input_ids": torch.zeros(3, TOKENS, dtype=torch.int64)}
        parameters = work.export(packed, wrapper, spec, example)
        del packed
        return work.finish(parameters, cases), handed

    def _unet(self) -> Exported:
        work = Work("unet", self.folder, self.precision, self.announce)
        packed = self._load("unet")
        wrapper, spec = graphs.Denoiser(packed.module), graphs.denoiser_spec(packed.module)
        cases, ranges = [], None
        texts = [self._unet_text(spec, text, size) for text, size in zip(self._text, self._sizes, strict=True)]
        timesteps = samples.timesteps(self.checkpoint.scheduler)
        # ranges are observed over some twenty runs: widened in each, the weights take longer than the arithmetic
        with packed.computing(keep=self.precision.integer and fits_in_memory(packed.wide_bytes)):
            for latents, text, t in zip(self._latents, texts, timesteps, strict=True):
                noised = samples.noised(latents, t, self.checkpoint.scheduler)
                feeds = {"sample": noised, "timestep": torch.tensor([t]), **text}
                cases.append((samples.to_numpy(feeds), samples.to_numpy(forward(wrapper, spec, feeds))))
            if self.precision.integer:
                ranges = quantize.observe(
                    packed.module,
                    [name for name in packed.matrices if packed.stored[name].scale is not None],
                    lambda: quantize.denoise(
                        lambda feeds: forward(wrapper, spec, feeds)["out_sample"],
                        self.checkpoint.scheduler,
                        list(zip(self._latents, texts, strict=True)),
                    ),
                )
        size = samples.traced_size(self.checkpoint.configs["unet"])
        names = {"batch": size.batch, "height": size.height, "width": size.width, "sequence_length": TOKENS}
        example = {n: torch.ones([names.get(a, a) for a in axes]) for n, axes in spec.inputs.items()}
        parameters = work.export(packed, wrapper, spec, example, ranges)
        del packed
        return work.finish(parameters, cases)

    def _unet_text(self, spec: graphs.GraphSpec, text: Feeds, size: samples.Size) -> Feeds:
        if "text_embeds" not in spec.inputs:
            return text
        return {**text, "time_ids": samples.size_conditioning(size, self._scale)}

    def _load(self, part: str) -> Packed:
        packed = load_packed(self.checkpoint, part, self.precision.weights, self.layers.get(part, {}))
        if packed.changed and self.precision.weights in ("fp16", "bf16"):
            self.notes.append(
                f"{part}: {packed.changed} weights were rounded to {self.precision.weights} "
                "(LoRA, or a checkpoint of higher precision)"
            )
        return packed


def load_packed(
    checkpoint: Checkpoint, part: str, weights: str, layers: Mapping[str, Sequence[tuple[LoraLayer, float]]]
) -> Packed:
    """A part in the storage `weights`, with `layers` (weight's published name -> LoRA layers, strengths) fused in."""
    module = load_module(checkpoint, part)
    packed = Packed(part, module, weights, lambda name, w: fused(w, layers.get(published_name(part, name), ())))
    if missed := set(layers) - {published_name(part, name) for name in packed.stored}:
        raise ExportError(
            f"{part}: its files name {min(missed)}, the loaded model has no such weight; the LoRA can't be fused"
        )
    return packed
