"""A diffusers folder on disk: what is in it, whether it can be exported, and its parts as torch modules.

Everything that can be refused is refused from JSON and file headers, before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..lora import LoraLayer
from ..safetensors_file import read_header
from .quiet import quiet

if TYPE_CHECKING:
    import torch
    from torch import nn

PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder", "vae", "unet"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "vae", "unet"),
}
_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
    "tiny_vae": ("AutoencoderTiny",),
}
_STEM = {"text_encoder": "model", "text_encoder_2": "model"}  # transformers' file name; diffusers' is the default below
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checked diffusers folder. `parts`: the parts to export -> their folders ('tiny_vae' may lie elsewhere)."""

    path: Path
    model_index: Mapping[str, Any]
    parts: Mapping[str, Path]
    configs: Mapping[str, Mapping[str, Any]]
    weight_files: Mapping[str, tuple[Path, ...]] = field(repr=False)
    variant: Mapping[str, str | None] = field(repr=False)
    scheduler: Mapping[str, Any] = field(repr=False)

    @property
    def sdxl(self) -> bool:
        """Two text encoders, size conditioning."""
        return "text_encoder_2" in self.parts

    def weight_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Names (as the published checkpoints have them) and shapes, from the files' headers alone."""
        headers = (read_header(path) for path in self.weight_files[part])
        return {published_name(part, name): e.shape for header in headers for name, e in header.entries.items()}


def open_checkpoint(path: Path, tiny_vae: Path | None = None) -> Checkpoint:
    """Check a local diffusers folder. ExportError says what is missing, pickled or of a kind that is not exported."""
    _require_folder(path)
    index = read_json(path / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ExportError(f"{path} is a {kind}; exported are {' and '.join(PIPELINES)}")
    parts = {name: path / name for name in PIPELINES[kind]}
    if tiny_vae is not None:
        parts["tiny_vae"] = tiny_vae
    configs = {name: read_json(folder / "config.json") for name, folder in parts.items()}
    found = {name: _weight_files(name, folder) for name, folder in parts.items()}
    for name, config in configs.items():
        _check_config(name, config)
    if tiny_vae is not None:
        _check_same_latents(configs["vae"], configs["tiny_vae"])
    return Checkpoint(
        path,
        index,
        parts,
        configs,
        {n: files for n, (files, _) in found.items()},
        {n: v for n, (_, v) in found.items()},
        read_json(path / "scheduler" / "scheduler_config.json"),
    )


def load_module(
    checkpoint: Checkpoint, part: str, layers: Mapping[str, Sequence[tuple[LoraLayer, float]]]
) -> nn.Module:
    """One part as a torch module in the precision of its files, with `layers` (weight name -> LoRA layers) fused in.

    Weights that a LoRA changes are float32 then, whatever the files hold.
    """
    module = _from_pretrained(checkpoint, part)
    if missed := set(layers) - {published_name(part, name) for name, _ in module.named_parameters()}:
        raise missing_weight(part, missed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = fused(parameter.data, layers.get(published_name(part, name), ()))
    return module.eval()


def missing_weight(part: str, missed: set[str]) -> ExportError:
    return ExportError(
        f"{part}: its files name {min(missed)}, the loaded model has no such weight; the LoRA can't be fused"
    )


def fused(weight: torch.Tensor, layers: Sequence[tuple[LoraLayer, float]]) -> torch.Tensor:
    """The weight with LoRA layers added, in float32; without any, the weight as it is."""
    import torch

    for layer, strength in layers:
        weight = weight.float() + torch.from_numpy(layer.delta(tuple(weight.shape), strength))
    return weight


def published_name(part: str, name: str) -> str:
    """transformers 5 dropped the level 'text_model.' of CLIPTextModel; published checkpoints and LoRA files have it."""
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"
    return name


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExportError(f"{path} is missing; export needs a whole diffusers folder (as save_pretrained writes it)")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ExportError(f"{path} is not valid JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch it again")
    return value


def _require_folder(path: Path) -> None:
    if path.is_file():
        raise ExportError(
            f"{path} is a single file; export needs a diffusers folder: convert it where you trust it with "
            "diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(folder, safe_serialization=True)"
        )
    if not path.is_dir():
        raise ExportError(f"{path} does not exist; give the path of a local diffusers folder")


def _weight_files(part: str, folder: Path) -> tuple[tuple[Path, ...], str | None]:
    """The safetensors files of a part (several when sharded) and diffusers' name of the variant, fp32 before fp16."""
    stem = _STEM.get(part, "diffusion_pytorch_model")
    for variant, whole, shards in (
        (None, f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        ("fp16", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    ):
        if (folder / whole).is_file():
            return (folder / whole,), variant
        if (folder / shards).is_file():
            return tuple(
                folder / name for name in sorted(set(read_json(folder / shards)["weight_map"].values()))
            ), variant
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise ExportError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run any code when they are read; allowed "
            "is .safetensors: fetch that version, or convert it where you trust it with "
            "from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
        )
    raise ExportError(f"{folder} holds no weights; expected {stem}.safetensors or {stem}.fp16.safetensors")


def _check_config(part: str, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if kind not in _CLASSES[part]:
        raise ExportError(f"{part} is a {kind}; exported is {_CLASSES[part][0]}")
    if part != "unet":
        return
    allowed = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "in_channels": (config.get("out_channels", 4),),  # inpainting and editing models have more
    }
    for key, values in allowed.items():
        got = config.get(key, values[0])
        if got not in values:
            raise ExportError(f"unet: {key} is {got!r}; text-to-image models with {_or(values)} are exported")


def _check_same_latents(vae: Mapping[str, Any], tiny: Mapping[str, Any]) -> None:
    channels = vae.get("latent_channels", 4), tiny.get("latent_channels", 4)
    levels = len(vae["block_out_channels"]), len(tiny["decoder_block_out_channels"])
    if len(set(channels)) > 1 or len(set(levels)) > 1:
        raise ExportError(
            f"tiny_vae decodes {channels[1]} channels over {levels[1]} levels, the checkpoint's latents have "
            f"{channels[0]} over {levels[0]}; use a tiny autoencoder made for these latents"
        )


def _or(values: tuple[Any, ...]) -> str:
    return " or ".join("null" if v is None else repr(v) for v in values)


def _from_pretrained(checkpoint: Checkpoint, part: str) -> nn.Module:
    import torch

    folder, variant = checkpoint.parts[part], checkpoint.variant[part]
    # read_header says in one line what a truncated or missing file would say in ten
    kinds = {e.dtype for path in checkpoint.weight_files[part] for e in read_header(path).entries.values()} - {"I64"}
    dtype = next((d for kind, d in (("F16", torch.float16), ("BF16", torch.bfloat16)) if kinds == {kind}), torch.float32)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
    with quiet():
        if part.startswith("text_encoder"):
            import transformers

            # eager: one causal mask for all layers, where the other kinds of attention build one in each
            options |= {"attn_implementation": "eager", "dtype": dtype, "output_loading_info": True}
            module, info = getattr(transformers, _CLASSES[part][0]).from_pretrained(folder, **options)
            missing = info["missing_keys"]
        else:
            import diffusers

            options |= {"dtype": dtype, "output_loading_info": True}
            module, info = getattr(diffusers, _CLASSES[part][0]).from_pretrained(folder, **options)
            missing = info["missing_keys"]
    if missing:
        raise ExportError(f"{folder}: {len(missing)} weights are missing, the first is {min(missing)}; fetch it again")
    return module
