"""demo-vegart's LoRA: demo-vega distilled to a few steps without guidance.

The form is LCM-LoRA's (arXiv:2311.05556): the same target modules, LCM's parametrisation and timesteps. The objective
is the consistency function itself, learned directly: from a noised latent to the end of the guided teacher's
ODE trajectory, which the teacher walks with DPM-Solver++(2M). Most of those latents are the student's own, noised
again as LCM's sampler does, so that it learns to mend what it will meet. LCM's own one-step bootstrapping needs far
more updates than a small model on a CPU is given (tried in a prototype: it made pictures worse than no LoRA).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from .base import context
from .checkpoints import load_weights, write_tokenizers
from .diffusion import Pool, Tokens, alphas_cumprod
from .hogwild import Job, train
from .models import TextToNoise, new_vega

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
RANK, ALPHA = 8, 4
GUIDANCE = 4.0
TIMESTEPS = (999, 879, 759, 639, 499, 379, 259, 139)  # LCM's eight; its four and two are among them
SHARE = (0.22, 0.04, 0.2, 0.04, 0.2, 0.04, 0.22, 0.04)
WALKS = (TIMESTEPS, TIMESTEPS[::2], TIMESTEPS[::4])
OWN = 0.7  # of the latents below pure noise are the student's
TEACHER_STEPS = {999: 10, 879: 9, 759: 8, 639: 7, 499: 6, 379: 5, 259: 4, 139: 3}


def new_student(folder: Path, lora: Path | None) -> TextToNoise:
    model = load_weights(new_vega(), folder)
    model.requires_grad_(False)
    model.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    if lora:
        load_lora(model.unet, lora)
    return model


def noised(x0: torch.Tensor, t: int, abar: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    return noise if t == TIMESTEPS[0] else abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * noise


def estimate(
    model: TextToNoise, x: torch.Tensor, t: int, text: torch.Tensor, pooled: torch.Tensor, abar: torch.Tensor
) -> torch.Tensor:
    """The model's x0 from x at t."""
    eps = model.predict(x, torch.full((len(x),), t), text, pooled)
    return (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()


@torch.no_grad()
def own_latents(
    model: TextToNoise,
    like: torch.Tensor,
    t: int,
    text: torch.Tensor,
    pooled: torch.Tensor,
    abar: torch.Tensor,
    rng: np.random.Generator,
) -> torch.Tensor:
    """What the student meets at timestep t: LCM's walk from noise, in 8, 4 or 2 steps, whichever have t.

    Scaled latents float32 [n, c, h, w], as `like`; text [n, 77, d], pooled [n, p], abar: alphas_cumprod [1000]."""
    walks = [w for w in WALKS if t in w]
    walk = walks[int(rng.integers(len(walks)))]
    x = noised(like, walk[0], abar, rng)
    for s, u in itertools.pairwise(walk[: walk.index(t) + 1]):
        x = noised(estimate(model, x, s, text, pooled, abar), u, abar, rng)
    return x


@torch.no_grad()
def trajectory_end(
    model: TextToNoise, x: torch.Tensor, t: int, text: torch.Tensor, pooled: torch.Tensor, abar: torch.Tensor
) -> torch.Tensor:
    """Where the guided teacher's ODE leads from x at t: DPM-Solver++(2M) (arXiv:2211.01095), steps uniform in log-SNR.

    x and the result are scaled latents [n, c, h, w]; the rest as in `own_latents`."""
    log_snr = 0.5 * (abar / (1 - abar)).log()
    grid = torch.linspace(float(log_snr[t]), float(log_snr[0]), TEACHER_STEPS[t] + 1)
    times = [int((log_snr - g).abs().argmin()) for g in grid]
    doubled, doubled_pooled = torch.cat([text, 0 * text]), torch.cat([pooled, 0 * pooled])
    previous = None
    for s, u in itertools.pairwise(times):
        eps, uncond = model.predict(torch.cat([x, x]), torch.full((2 * len(x),), s), doubled, doubled_pooled).chunk(2)
        eps = uncond + GUIDANCE * (eps - uncond)
        x0 = (x - (1 - abar[s]).sqrt() * eps) / abar[s].sqrt()
        h = log_snr[u] - log_snr[s]
        d = x0
        if previous is not None:
            r = (log_snr[s] - log_snr[previous[1]]) / h
            d = x0 + (x0 - previous[0]) / (2 * r)
        x = ((1 - abar[u]) / (1 - abar[s])).sqrt() * x - abar[u].sqrt() * torch.expm1(-h) * d
        previous = (x0, s)
    return x0


class Replay:
    """The last batches of (x, t, trajectory end, captions): a teacher's walk costs ten updates, so each is used again."""

    def __init__(self, fresh: float = 0.25, size: int = 200) -> None:
        self.fresh, self.size, self.items = fresh, size, []

    def next(self, make: Callable[[], tuple], rng: np.random.Generator) -> tuple:
        if len(self.items) < 8 or rng.random() < self.fresh:
            item = make()
            self.items = [*self.items[-self.size + 1 :], item]
            return item
        return self.items[int(rng.integers(len(self.items)))]


def distill_loss(
    model: TextToNoise,
    pool: Pool,
    tokens: Tokens,
    replay: Replay,
    batch: int,
    rng: np.random.Generator,
    progress: float,
) -> torch.Tensor:
    abar = alphas_cumprod()

    def make() -> tuple:
        latents, _, captions = pool.batch(batch, rng)
        t = int(rng.choice(TIMESTEPS, p=SHARE))
        with torch.no_grad():
            text, pooled = model.encode(tokens(captions))
        if rng.random() < OWN:
            x = own_latents(model, latents, t, text, pooled, abar, rng)
        else:
            x = noised(latents, t, abar, rng)
        model.unet.disable_adapters()
        end = trajectory_end(model, x, t, text, pooled, abar)
        model.unet.enable_adapters()
        return x, t, text, pooled, end

    x, t, text, pooled, end = replay.next(make, rng)
    x0 = estimate(model, x, t, text, pooled, abar)
    return (((x0 - end) ** 2 + 0.01).sqrt() - 0.1).mean()  # pseudo-Huber: sharp where L2 would blur


def distill_context(vae: Path, cache: Path, tokenizers: list[Path], pool: int) -> tuple[Pool, Tokens, Replay]:
    return (*context(vae, cache, tokenizers, pool)[:2], Replay())


def _adapters(unet: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Kohya's key of each adapted module, with its down and up weights."""
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield "lora_unet_" + name.replace(".", "_"), down, up


def save_lora(unet: nn.Module, file: Path) -> None:
    """Kohya's keys, as LCM-LoRAs are published: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    tensors = {}
    for key, down, up in _adapters(unet):
        tensors[f"{key}.lora_down.weight"] = down.detach().half().contiguous()
        tensors[f"{key}.lora_up.weight"] = up.detach().half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(ALPHA), dtype=torch.float16)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def load_lora(unet: nn.Module, file: Path) -> None:
    """`save_lora`'s inverse, into a U-Net that has the adapters."""
    tensors = load_file(file)
    for key, down, up in _adapters(unet):
        down.data.copy_(tensors[f"{key}.lora_down.weight"])
        up.data.copy_(tensors[f"{key}.lora_up.weight"])


def distill(
    base: Path,
    vae: Path,
    cache: Path,
    out: Path,
    steps: int,
    *,
    start: Path | None = None,
    peak_lr: float = 2e-3,
    pool: int = 40_000,
    processes: int = 2,
    seed: int = 5,
) -> None:
    """Trains the LoRA and writes it into the folder `out`; with `start`, a LoRA's file, goes on from that one."""
    tokenizers = write_tokenizers(cache / "demo-vega", "vega")
    distill_context(vae, cache, tokenizers, pool)  # encodes the pool once, before the workers start
    job = Job(
        "demo-vegart",
        partial(new_student, base, start),
        distill_loss,
        partial(distill_context, vae, cache, tokenizers, pool),
        steps,
        batch=32,
        peak_lr=peak_lr,
        seed=seed,
    )
    model = train(job, processes, snapshot=lambda m: save_lora(m.unet, cache / "lora-snapshot.safetensors"))
    save_lora(model.unet, out / "pytorch_lora_weights.safetensors")
