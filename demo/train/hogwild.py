"""Training on every core: one single-threaded process each, on the same weights in shared memory, without locks
(Hogwild, arXiv:1106.5730). On a machine that does other work too this loses nothing to barriers. Runs are seeded, but
repeat each other statistically, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import multiprocessing, nn

from .common import Ema, Log, learning_rate
from .muon import Muon


def share_weights(module: nn.Module) -> torch.Tensor:
    """A copy of all parameters in one float32 vector [n], in memory that other processes see."""
    flat = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    return flat.share_memory_()


@torch.no_grad()
def alias_weights(module: nn.Module, flat: torch.Tensor) -> None:
    """Makes the module's parameters views of the shared vector."""
    at = 0
    for p in module.parameters():
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


@dataclass
class Job:
    """What a worker needs, picklable. `new` builds the network, `loss` gives the loss of one batch."""

    name: str
    new: Callable[[], nn.Module]
    loss: Callable[..., torch.Tensor]
    context: Callable[[], tuple]  # builds what `loss` takes after the model (pool, tokens, ...)
    steps: int
    batch: int
    peak_lr: float
    seed: int


def _worker(rank: int, job: Job, flat: torch.Tensor, mean: torch.Tensor, count: torch.Tensor) -> None:
    torch.set_num_threads(1)
    model = job.new()
    alias_weights(model, flat)
    context = job.context()
    rng = np.random.default_rng([job.seed, rank])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Muon(model.named_parameters(), job.peak_lr)
    ema = Ema(model.parameters()) if rank == 0 else None
    log, own = Log(job.name, job.steps), 0
    while int(count) < job.steps:
        step = int(count.add_(1))
        loss = job.loss(model, *context, job.batch, rng, step / job.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(learning_rate(step, job.steps, job.peak_lr))
        if ema:
            ema.update(step)
            log(step, loss.item())
            own += 1
            if own % 50 == 0:  # for snapshots; of this process's own steps, since any other may draw a round number
                mean.copy_(nn.utils.parameters_to_vector(ema.mean))
    if ema:
        mean.copy_(nn.utils.parameters_to_vector(ema.mean))


def train(job: Job, processes: int = 2, snapshot: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Runs the job and returns the averaged network; `snapshot` is called with it now and then."""
    torch.manual_seed(job.seed)
    model = job.new()
    flat, count = share_weights(model), torch.zeros((), dtype=torch.int64).share_memory_()
    mean = flat.clone().share_memory_()
    context = multiprocessing.spawn(_worker, (job, flat, mean, count), nprocs=processes, join=False)
    while not context.join(timeout=300):
        if snapshot:
            alias_weights(model, mean.clone())
            snapshot(model)
    alias_weights(model, mean.clone())
    return model
