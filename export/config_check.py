"""Which configurations can be exported, from their JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ExportError
from .modules import CLASSES
from .tokenizer_files import TOKENS

# A part's list of channels, one a level: how far it shrinks a picture
_LEVELS = {
    "unet": "block_out_channels",
    "vae": "block_out_channels",
    "tiny_vae": "decoder_block_out_channels",
}
_SIZES = 6  # numbers of SDXL's size conditioning; its refiner has 5, the last an aesthetic score
_REFINER = (
    "is SDXL's refiner, which finishes what a base model has begun and draws nothing alone; export the base model"
)
# What a model would be fed besides latents, timestep, text and sizes, and what takes other numbers of them. All else in
# these configurations is in the graph, which is compared with torch.
_ALLOWED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "unet": {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),
        "attention_type": ("default",),
    },
    "vae": {"in_channels": (3,), "out_channels": (3,)},
    "tiny_vae": {"in_channels": (3,), "out_channels": (3,)},
    "text_encoder": {"max_position_embeddings": (TOKENS,)},
    "text_encoder_2": {"max_position_embeddings": (TOKENS,)},
}
_MEANING = {
    "num_class_embeds": "it draws classes by number",
    "class_embed_type": "it draws classes or what else it is given beside a text",
    "in_channels": "inpainting and editing models have more",
    "time_cond_proj_dim": "it takes its guidance as an input",
    "encoder_hid_dim_type": "it takes a picture beside the text, or its text is projected",
    "encoder_hid_dim": "its text is projected",
    "attention_type": "it takes boxes beside the text",
}


def pipeline_fault(index: Mapping[str, Any], known: Iterable[str]) -> str:
    """What is wrong with the kind of pipeline that a model_index.json names: a predicate, '' if it is exported."""
    kind = index.get("_class_name")
    if isinstance(kind, str) and kind.startswith("StableDiffusionXL") and "text_encoder_2" in index:
        without_first = index.get("text_encoder") in (None, [None, None])
        if index.get("requires_aesthetics_score") is True or without_first:
            return _REFINER
    return "" if isinstance(kind, str) and kind in known else f"is a {kind}; exported are {' and '.join(known)}"


def check_config(part: str, config: Mapping[str, Any]) -> None:
    """ExportError for a network of another kind than is exported, or without the numbers that the export goes by."""
    named = config.get("architectures") or [None]
    if not isinstance(named, list):
        raise ExportError(f"{part}: architectures is {named!r}, not a list; exported is ['{CLASSES[part]}']")
    kind = config.get("_class_name") or named[0]
    if kind != CLASSES[part]:
        raise ExportError(f"{part} is a {kind}; exported is {CLASSES[part]}")
    if config.get("quantization_config") is not None:
        raise ExportError(f"{part}: its weights are quantized (quantization_config); export the model in fp16 or fp32")
    if (levels := _LEVELS.get(part)) is not None and not _are_counts(config.get(levels)):
        got = config.get(levels)
        raise ExportError(
            f"{part}: {levels} is {got!r}; it must be a list of whole numbers; fetch its config.json again"
        )
    allowed = dict(_ALLOWED[part])
    if part == "unet":
        allowed["in_channels"] = (config.get("out_channels", 4),)
    for key, values in allowed.items():
        got = config.get(key, values[0])
        if got not in values:
            what = "text-to-image models" if part == "unet" else "those"
            meaning = f" ({_MEANING[key]})" if key in _MEANING else ""
            raise ExportError(f"{part}: {key} is {got!r}{meaning}; {what} with {_or(values)} are exported")


def check_together(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """ExportError where one part would be fed other numbers than another gives."""
    unet, vae = configs["unet"], configs["vae"]
    encoders = [config for part, config in configs.items() if part.startswith("text_encoder")]
    given = sum(_count("text encoder", config, "hidden_size", 512) for config in encoders)
    if unet.get("cross_attention_dim", 1280) != given:
        raise ExportError(
            f"unet: cross_attention_dim is {unet.get('cross_attention_dim', 1280)!r}, the text encoders give {given}; "
            "use the parts of one model"
        )
    latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if latents[0] != latents[1]:
        raise ExportError(
            f"unet: in_channels is {latents[0]!r}, the vae's latents have {latents[1]!r}; use its own vae"
        )
    kind = unet.get("addition_embed_type")
    if (kind == "text_time") != ("text_encoder_2" in configs):
        raise ExportError(
            f"unet: addition_embed_type is {kind!r} with {len(encoders)} text encoders; 'text_time' goes with two, "
            "null with one"
        )
    if kind == "text_time":
        pooled = _count("text_encoder_2", configs["text_encoder_2"], "projection_dim", 512)
        width = _count("unet", unet, "projection_class_embeddings_input_dim", 0) - pooled
        each = _count("unet", unet, "addition_time_embed_dim", 256)
        if width == (_SIZES - 1) * each:
            raise ExportError(f"unet {_REFINER}")
        if width != _SIZES * each:
            raise ExportError(
                f"unet: projection_class_embeddings_input_dim is {width + pooled}, which must be {_SIZES} times "
                f"addition_time_embed_dim and text_encoder_2's projection_dim, {_SIZES * each + pooled}"
            )


def _count(part: str, config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ExportError(f"{part}: {key} is {value!r}; it must be a whole number; fetch its config.json again")
    return value


def check_same_latents(vae: Mapping[str, Any], tiny: Mapping[str, Any]) -> None:
    """ExportError for a tiny autoencoder of other latents."""
    channels = vae.get("latent_channels", 4), tiny.get("latent_channels", 4)
    levels = len(vae["block_out_channels"]), len(tiny["decoder_block_out_channels"])
    if len(set(channels)) > 1 or len(set(levels)) > 1:
        raise ExportError(
            f"tiny_vae decodes {channels[1]} channels over {levels[1]} levels, the checkpoint's latents have "
            f"{channels[0]} over {levels[0]}; use a tiny autoencoder made for these latents"
        )


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(n) is int and n > 0 for n in value)


def _or(values: tuple[Any, ...]) -> str:
    return " or ".join("null" if v is None else repr(v) for v in values)
