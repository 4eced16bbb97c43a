"""Whole pictures against diffusers: the embedded checkpoints, the same seed, scheduler and steps, in fp32.

A grid that is off by one timestep still reaches 58 dB, so the bounds are far tighter than an eye would need, and
the last tests show that the usual mistakes exceed them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vega_edge.models import recipes
from vega_edge.runtime import request, schedules
from vega_edge.runtime.pipeline import Pipeline
from vega_edge.runtime.schedulers import Scheduler, get_scheduler

pytest.importorskip("torch", reason="compares with diffusers, which needs torch (the export extra)")

from vega_edge.bench.parity import FEW, SCHEDULERS, compare, reference_pipeline
from vega_edge.export.checkpoint import load_module, open_checkpoint
from vega_edge.export.parts import load_packed
from vega_edge.lora import match_lora, read_lora

from .full import IN_FULL

# All four by name: one whose weights are missing must fail, not vanish. Two have the networks of the other two.
AGAIN = [pytest.param(name, marks=IN_FULL) for name in ("demo-tiny-sd", "demo-vegart")]


@pytest.fixture(scope="module", params=["demo-small-sd", "demo-vega", *AGAIN])
def both(request: pytest.FixtureRequest, exported: Callable[..., Path]) -> tuple[Pipeline, Any]:
    return Pipeline.open(lossless(exported, request.param), "onnxruntime-cpu"), reference_pipeline(request.param)


def lossless(exported: Callable[..., Path], name: str) -> Path:
    """Weights as exact as the checkpoint's: halves are, until a LoRA is added to them."""
    return exported(name) if recipes()[name].lora_paths else exported(name, "--weights", "fp16")


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_same_picture_as_diffusers(both: tuple[Pipeline, Any], scheduler: str, guidance: float) -> None:
    parity = compare(*both, scheduler, 4 if scheduler in FEW else 8, guidance)
    assert parity.good, parity


def test_without_a_negative_prompt(both: tuple[Pipeline, Any]) -> None:
    """Zeros for the SDXL kind (force_zeros_for_empty_prompt), the encoded empty prompt for the other."""
    parity = compare(*both, "DPM Multi", 6, 4.0, negative=None)
    assert parity.good, parity


@pytest.fixture(scope="module")
def vega(exported: Callable[..., Path]) -> tuple[Path, Any]:
    return lossless(exported, "demo-vega"), reference_pipeline("demo-vega")


def test_a_shifted_grid_is_noticed(vega: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model: schedules.NoiseModel, n: int, named: str | None = None) -> schedules.Schedule:
        schedule = schedules.euler(model, n)
        return replace(schedule, timesteps=schedule.timesteps - 1)

    def moved(name: str, family: str = "diffusers") -> Scheduler:
        return replace(get_scheduler(name, family), grid=shifted)

    monkeypatch.setattr(request, "get_scheduler", moved)
    assert not compare(Pipeline.open(vega[0], "onnxruntime-cpu"), vega[1], "Euler", 8, 3.0).good


def test_a_wrong_pad_token_is_noticed(vega: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(vega[0], tmp_path / "bundle"))
    (bundle / "vega-edge.json").unlink()  # it would notice by itself
    path = bundle / "tokenizer_2" / "special_tokens_map.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|endoftext|>"}))
    assert not compare(Pipeline.open(bundle, "onnxruntime-cpu"), vega[1], "Euler", 8, 3.0).good


def test_the_lora_is_fused_as_diffusers_fuses_it() -> None:
    recipe = recipes()["demo-vegart"]
    checkpoint = open_checkpoint(recipe.checkpoint_path)
    ((path, strength),) = recipe.lora_paths
    matched = match_lora(read_lora(path), {"unet": checkpoint.weight_shapes("unet")})["unet"]
    plain = {n: p.numpy() for n, p in load_module(checkpoint, "unet").named_parameters()}
    layers = {weight: [(layer, strength)] for weight, layer in matched.items()}
    fused = {n: stored.data.numpy() for n, stored in load_packed(checkpoint, "unet", "fp32", layers).stored.items()}
    expected = {n: p.detach().numpy() for n, p in reference_pipeline("demo-vegart").unet.named_parameters()}
    assert set(fused) == set(expected)
    for name in fused:
        np.testing.assert_allclose(fused[name], expected[name], atol=1e-6, err_msg=name)
    assert all(layer.scale != 1 for layer in matched.values())  # so an ignored alpha would be another weight:
    name, layer = next(iter(matched.items()))
    ignored = plain[name] + replace(layer, scale=1.0).delta(plain[name].shape, strength)
    assert np.abs(ignored - expected[name]).max() > 1e-3
