"""diffusers as a fair peer of a bundle: the same networks from the bundle's configurations, and how much work they are.

Weights are random: for time they need not be trained, and a bundle has none that torch reads.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..bundle import Bundle
from ..runtime.tokenizer import TOKENS

_LATENT_PX = 8
# dynamic=False: else the second batch's size makes it compile for any, slower
COMPILED: dict[str, Any] = {"fullgraph": True, "dynamic": False}
COMPILE_MODES = ("max-autotune", "reduce-overhead")


class Peer:
    """Draws one batch with the loop that diffusers' pipelines run; __call__ returns the seconds of each stage. `calls`: of
    the U-Net, for the last batch.

    The scheduler is not what is compared: Euler's update stands for any. Text, networks and decoder are diffusers' own.
    """

    def __init__(self, networks: Mapping[str, Any], defaults: Mapping[str, Any], device: str, batch: int) -> None:
        self._networks, self._device, self._batch = networks, torch.device(device), batch
        self._steps, self._guided = int(defaults["steps"]), float(defaults["guidance"]) > 1
        self._size = int(defaults["height"]), int(defaults["width"])
        self._scale = 2 ** (len(networks["vae"].config.block_out_channels) - 1) if "vae" in networks else _LATENT_PX
        unet = networks["unet"]
        self._dtype = next(unet.parameters()).dtype
        self.calls = 0
        self._ids = torch.randint(0, networks["text_encoder"].config.vocab_size, (1, TOKENS), device=self._device)

    def __call__(self, seed: int) -> dict[str, float]:
        with torch.inference_mode():
            return self._draw(seed)

    def _draw(self, seed: int) -> dict[str, float]:
        stages, clock = {}, time.perf_counter()
        feeds = self._text()
        stages["text"], clock = self._lap(clock)
        latents = self._denoise(feeds, seed)
        stages["denoise"], clock = self._lap(clock)
        vae = self._networks["vae"]
        image = self._networks["decode"](latents.to(vae.dtype) / vae.config.scaling_factor)[0]
        pixels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pixels.cpu().numpy()
        stages["decode"], _ = self._lap(clock)
        return stages

    def close(self) -> None:
        self._networks = {}
        torch._dynamo.reset()  # compiled code refers to the weights
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _lap(self, clock: float) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        return now - clock, now

    def _text(self) -> dict[str, Any]:
        rows = self._batch * (2 if self._guided else 1)
        outs = [
            self._networks[n](self._ids, output_hidden_states=True)
            for n in ("text_encoder", "text_encoder_2")
            if n in self._networks
        ]
        if self._guided:  # the negative prompt too
            outs = [
                self._networks[n](self._ids, output_hidden_states=True)
                for n in ("text_encoder", "text_encoder_2")
                if n in self._networks
            ]
        if len(outs) == 1:
            return {"encoder_hidden_states": outs[0].last_hidden_state.repeat(rows, 1, 1)}
        hidden = torch.cat([out.hidden_states[-2] for out in outs], -1).repeat(rows, 1, 1)
        height, width = self._size
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=self._device, dtype=self._dtype).repeat(
            rows, 1
        )
        added = {"text_embeds": outs[1].text_embeds.repeat(rows, 1), "time_ids": ids}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    def _denoise(self, feeds: Mapping[str, Any], seed: int) -> torch.Tensor:
        self.calls = 0
        generator = torch.Generator(self._device).manual_seed(seed)
        channels, (height, width) = self._networks["unet"].config.in_channels, self._size
        shape = (self._batch, channels, height // self._scale, width // self._scale)
        x = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        for step in range(self._steps):
            t = torch.full((1,), 999.0 - step, device=self._device)
            given = torch.cat((x, x)) if self._guided else x
            given = given.contiguous(memory_format=torch.channels_last)
            self.calls += 1
            out = self._networks["forward"](given, t, **feeds, return_dict=False)[0]
            if self._guided:
                away, toward = out.chunk(2)
                out = away + 3.0 * (toward - away)
            x = x - out / self._steps
        return x


def peer(bundle: Bundle, defaults: Mapping[str, Any], device: str, *, compile_mode: str | None, batch: int) -> Peer:
    """compile_mode: torch.compile's, None for eager."""
    half = torch.float16 if device != "cpu" else torch.float32
    with torch.device(device):  # a billion random numbers take many seconds on a CPU
        networks = {name: network.to(half).eval() for name, network in networks_of(bundle).items()}
    if device != "cpu":
        networks["vae"] = networks["vae"].to(decoder_dtype(bundle))
    for name in ("unet", "vae"):
        networks[name] = networks[name].to(memory_format=torch.channels_last)
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()  # of the float32 numbers that they were made as
    forward, decode = networks["unet"], networks["vae"].decode
    if compile_mode:
        forward, decode = (torch.compile(each, mode=compile_mode, **COMPILED) for each in (forward, decode))
    return Peer(
        {**networks, "forward": forward, "decode": lambda z: decode(z, return_dict=False)}, defaults, device, batch
    )


def decoder_dtype(bundle: Bundle) -> torch.dtype:
    """What our bundle's decoder computes in, by its manifest; fp16 where there is none. The peer's does too."""
    if bundle.manifest is None:
        return torch.float16
    told = bundle.manifest.parts["vae_decoder"].dtype or bundle.manifest.dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(told, torch.float16)


def free_bytes(device: str) -> int:
    """Of the whole GPU; 0 on a CPU, where it would mean something else."""
    return 0 if device == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def networks_of(bundle: Bundle) -> dict[str, Any]:
    """Random weights, on torch's current default device."""
    vae = bundle.config("vae_decoder")
    made: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(bundle.config("unet")),
        "vae": (AutoencoderTiny if "decoder_block_out_channels" in vae else AutoencoderKL).from_config(vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**bundle.config("text_encoder"))),
    }
    if "text_encoder_2" in bundle.parts:
        made["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**bundle.config("text_encoder_2")))
    return made


def flops(bundle: Bundle, stage: str, defaults: Mapping[str, Any]) -> float:
    """Operations of one evaluation for one picture (1 multiply-add = 2), counted on torch's meta device."""
    with torch.device("meta"):
        networks = networks_of(bundle)
        counted = Peer(
            {**networks, "forward": networks["unet"], "decode": networks["vae"].decode},
            {**defaults, "guidance": 0, "steps": 1},
            "meta",
            1,
        )
        counter = FlopCounterMode(display=False)
        height, width = (int(defaults[side]) // counted._scale for side in ("height", "width"))
        latents = torch.empty(1, networks["unet"].config.in_channels, height, width)
        with counter, torch.no_grad():
            if stage == "text":
                counted._text()
            elif stage == "denoise":
                feeds = counted._text()
                before = counter.get_total_flops()
                networks["unet"](latents, torch.empty(1), **feeds, return_dict=False)
                return float(counter.get_total_flops() - before)
            else:
                networks["vae"].decode(latents, return_dict=False)
        return float(counter.get_total_flops())


def pipeline_flops(work: Mapping[str, float], defaults: Mapping[str, Any], batch: int) -> float:
    """Of a whole request: guidance evaluates twice."""
    twice = 2 if float(defaults["guidance"]) > 1 else 1
    return work["text"] * twice + batch * (work["denoise"] * twice * int(defaults["steps"]) + work["decode"])


def matmul_peak(device: str, side: int = 8192) -> float:
    """FLOP/s of a large matrix product, the best of ten: what this card can do, by measurement. On a CPU a small one.

    torch keeps no memory of it: a peer that was given that again would seem to take less than it does."""
    on_gpu = device != "cpu"
    side, kind = (side, torch.float16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(13):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del a, b
    if on_gpu:
        torch.cuda.empty_cache()
    return 2 * side**3 / best
