"""The training's command and its shared weights, without training anything worth the name."""

from __future__ import annotations

import sys
from functools import partial

import pytest

pytest.importorskip("torch", reason="training needs torch (the export extra)")
pytest.importorskip("peft", reason="training needs peft (the train extra)")

import torch
from torch import nn

from vega_edge.demo.train import __main__ as command
from vega_edge.demo.train import hogwild


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["decoder", "--peak-lr", "1e-3"], "--peak-lr is not for decoder; it is for demo-vega, "),
        (["--peak-lr", "1e-3"], "--peak-lr is not for autoencoder, decoder, text-encoders, tiny-autoencoder; "),
        (["demo-vega", "demo-tiny-sd", "--start", "x"], "--start is for one stage, got 2: "),
        (["autoencoder", "--start", "x"], "--start is not for autoencoder; it is for text-encoders, demo-vega, "),
        (["sleep"], "unknown stage 'sleep'; there are: "),
    ],
)
def test_options_that_a_stage_would_not_look_at_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--out", "nowhere", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def loss(model: nn.Module, *_: object) -> torch.Tensor:
    return model(torch.ones(1, 3)).square().sum()


@pytest.mark.parametrize("start", [0, 7, 49])
def test_the_average_is_handed_over_whatever_steps_the_first_process_draws(start: int) -> None:
    """Others draw the rest: with many cores it may never see a round number, nor one of the last."""
    torch.manual_seed(0)
    job = hogwild.Job("test", partial(nn.Linear, 3, 2), loss, tuple, start + 3, batch=1, peak_lr=1e-2, seed=1)
    flat = hogwild.share_weights(job.new())
    before, mean, count = flat.clone(), flat.clone(), torch.tensor(start, dtype=torch.int64)
    threads = torch.get_num_threads()
    try:
        hogwild._worker(0, job, flat, mean, count)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(flat, before) and not torch.equal(mean, before)
    assert (mean - flat).norm() < (before - flat).norm()
