"""The networks, new: the classes and the shape of Segmind's configurations, scaled down; and their folders on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..scenes import vocabulary
from .placement import ANSWERS

START, END = "<|startoftext|>", "<|endoftext|>"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TIME_ID_WIDTH = 16
TEXT_WIDTH_1, TEXT_WIDTH_2, SD_TEXT_WIDTH = 48, 64, 64


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's and CLIP's byte-level BPE, in CLIP's order ('!' first)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(folder: Path, pad: str) -> None:
    """A CLIP tokenizer whose merges make each word of the vocabulary one token; any other text falls to letters."""
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    singles = _byte_symbols()
    tokens = [*singles, *(s + "</w>" for s in singles), *("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    folder.mkdir(parents=True, exist_ok=True)

    def dump(name: str, value: Any) -> None:
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    dump("vocab.json", {t: i for i, t in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dump("special_tokens_map.json", special)
    dump(
        "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **special,
        },
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def new_text_encoder(width: int, heads: int, activation: str, projection: int | None = None) -> nn.Module:
    # eos_token_id 2 is what the published configurations say; it makes transformers take the highest id as the end.
    config = CLIPTextConfig(
        vocab_size=vocabulary_size(), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=heads,
        hidden_act=activation, max_position_embeddings=77, projection_dim=projection or width, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"  # its backward pass is several times faster than SDPA's on a CPU
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vocabulary_size() -> int:
    merges = {word[:i] + ("</w>" if i == len(word) else "") for word in vocabulary() for i in range(2, len(word) + 1)}
    return 512 + len(merges) + 2


def new_vega_unet() -> UNet2DConditionModel:
    """Segmind-Vega's configuration at a tenth of its width."""
    return _trainable(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 80),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[1, 2, 2],
            cross_attention_dim=TEXT_WIDTH_1 + TEXT_WIDTH_2,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * TIME_ID_WIDTH,
            use_linear_projection=True,
            norm_num_groups=8,
        )
    )


def new_sd_unet(kind: str) -> UNet2DConditionModel:
    """Small-SD's configuration ('small'), or Tiny-SD's ('tiny': no middle block, one level less), scaled down."""
    levels = 4 if kind == "small" else 3
    return _trainable(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 48, 64, 64)[:levels],
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) * (levels - 3),
            mid_block_type="UNetMidBlock2DCrossAttn" if kind == "small" else None,
            up_block_types=("UpBlock2D",) * (levels - 3) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
            cross_attention_dim=SD_TEXT_WIDTH,
            norm_num_groups=8,
        )
    )


def _trainable(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    unet.set_attn_processor(AttnProcessor())  # as above: SDPA's backward pass is slow on a CPU
    return unet


class TextToNoise(nn.Module):
    """A U-Net with its text encoders: noised latents, timesteps and token ids to predicted noise.

    `readers` serve the training only, see `placement.py`.
    """

    def __init__(self, unet: UNet2DConditionModel, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.unet, self.encoders = unet, nn.ModuleList(encoders)
        self.readers = nn.ModuleList(nn.Linear(e.config.hidden_size, ANSWERS) for e in encoders)
        self.sdxl = len(encoders) == 2

    def encode(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [n, 77] an encoder -> hidden states [n, 77, d] and, for the SDXL kind, the pooled vector [n, p]."""
        if not self.sdxl:
            return self.encoders[0](ids[0]).last_hidden_state, None
        first = self.encoders[0](ids[0], output_hidden_states=True)
        second = self.encoders[1](ids[1], output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        extra = None
        if pooled is not None:
            h, w = x.shape[-2] * 8, x.shape[-1] * 8
            ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32).repeat(len(x), 1)
            extra = {"text_embeds": pooled, "time_ids": ids}
        return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=extra).sample


def new_vega() -> TextToNoise:
    encoders = [
        new_text_encoder(TEXT_WIDTH_1, 3, "quick_gelu"),
        new_text_encoder(TEXT_WIDTH_2, 4, "gelu", TEXT_WIDTH_2),
    ]
    return TextToNoise(new_vega_unet(), encoders)


def new_sd(kind: str) -> TextToNoise:
    return TextToNoise(new_sd_unet(kind), [new_text_encoder(SD_TEXT_WIDTH, 4, "quick_gelu")])
