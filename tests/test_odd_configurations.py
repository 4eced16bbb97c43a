"""A bundle as another tool exports it, each number of its configurations replaced by odd ones: it draws, or one line says
which number it is, and memory stays bounded. The graphs are opened once for all of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vega_edge import Pipeline
from vega_edge.bench.machine import peak_mb
from vega_edge.bundle import Bundle
from vega_edge.engines import Engine, open_engine
from vega_edge.errors import BundleError, UsageError, VegaEdgeError
from vega_edge.models import find_bundle
from vega_edge.runtime import parts
from vega_edge.runtime.scheduler_config import MAX_TIMESTEPS, fault_in
from vega_edge.runtime.schedulers import get_scheduler

ODD = ["x", [], None, float("nan"), -1, 0, 1.5, 10**9, 10**40]
READ = {  # those that the runtime goes by; of the others a few values must be enough
    "in_channels", "sample_size", "block_out_channels", "decoder_block_out_channels", "scaling_factor", "latents_mean",
    "latents_std", "num_hidden_layers",
}  # fmt: skip
CONFIGS = [
    "scheduler/scheduler_config", "unet/config", "vae_decoder/config", "vae_encoder/config", "text_encoder/config",
    "text_encoder_2/config", "tokenizer/tokenizer_config",
]  # fmt: skip
MOST_GROWTH = 400  # MB; num_train_timesteps 10**9 took 22 GB


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path_factory.mktemp("odd") / "bundle"))
    (bundle / "vega-edge.json").unlink()
    return bundle


@pytest.fixture(scope="module")
def engines(plain: Path) -> Iterator[Callable[..., Engine]]:
    """In place of `open_engine`: each graph once. Their networks are what they were, whatever a configuration says."""
    opened: dict[str, Any] = {}

    class Kept:
        def __init__(self, engine: Engine) -> None:
            self.inputs, self.outputs, self.run = engine.inputs, engine.outputs, engine.run

        def close(self) -> None:
            pass

    def cached(path: Path, engine: str, **_: Any) -> Any:
        if str(path) not in opened:
            opened[str(path)] = open_engine(path, engine, threads=1)
        return Kept(opened[str(path)])

    yield cached
    for engine in opened.values():
        engine.close()


@contextlib.contextmanager
def changed(path: Path, **changes: Any) -> Iterator[None]:
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), **changes}), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def draw(bundle: Path, **options: Any) -> Any:
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipe:
        return pipe("a star", **{"steps": 1, "width": 64, "height": 64, "seed": 1, **options})


def is_numeric(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or any(isinstance(v, (int, float)) for v in values)


@pytest.mark.parametrize("config", CONFIGS)
def test_odd_numbers(config: str, plain: Path, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "open_engine", engines)
    path = plain / f"{config}.json"
    draw(plain)
    start = peak_mb()
    keys = [key for key, value in json.loads(path.read_text()).items() if is_numeric(value)]
    if "scheduler" in config:
        keys += ["trained_betas", "solver_order", "original_inference_steps", "rescale_betas_zero_snr"]
    if "vae" in config:
        keys += ["latents_mean", "latents_std", "scaling_factor"]
    for key in dict.fromkeys(keys):
        for odd in ODD if key in READ or "scheduler" in config else ["x", 10**9]:
            with changed(path, **{key: odd}):
                try:
                    draw(plain)
                except VegaEdgeError as error:
                    assert "\n" not in str(error) and len(str(error)) < 700, (key, odd)
                except Exception as error:
                    raise AssertionError(f"{config}: {key} = {odd!r}: {type(error).__name__}: {error}") from error
            assert peak_mb() - start < MOST_GROWTH, (key, odd)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("vae_decoder/config.json", "scaling_factor", "x"),
        ("vae_decoder/config.json", "scaling_factor", 0),
        ("vae_decoder/config.json", "scaling_factor", float("nan")),
        ("vae_decoder/config.json", "latents_mean", [1.0]),
        ("vae_decoder/config.json", "block_out_channels", [8] * 40),
        ("unet/config.json", "sample_size", [16, 16]),
        ("unet/config.json", "in_channels", 10**9),
        ("scheduler/scheduler_config.json", "trained_betas", []),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1] * 100),
        ("scheduler/scheduler_config.json", "trained_betas", [float("nan")] * 1000),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 1000.0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", True),
        ("scheduler/scheduler_config.json", "original_inference_steps", 1001),
        ("scheduler/scheduler_config.json", "beta_start", "0.1"),
        ("scheduler/scheduler_config.json", "beta_end", 1),
        ("scheduler/scheduler_config.json", "steps_offset", -1),
    ],
)
def test_the_error_names_file_key_and_value(plain: Path, file: str, key: str, value: Any) -> None:
    with changed(plain / file, **{key: value}), pytest.raises(BundleError) as caught:
        Pipeline.open(plain, "onnxruntime-cpu")
    shown = "100 numbers" if value == [0.1] * 100 else json.dumps(value)[:40]
    assert all(text in str(caught.value) for text in (str(plain), file, key, shown)), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("key", "most"),
    [("in_channels", 64), ("sample_size", 4096), ("block_out_channels", 8), ("num_hidden_layers", 1 << 16)],
)
def test_the_largest_numbers_that_are_read(plain: Path, key: str, most: int) -> None:
    """Both sides: the largest is read, whatever comes of it in the network, and one more is refused by name."""
    bundle = Bundle.open(plain)
    part = "text_encoder" if key == "num_hidden_layers" else "unet"
    for number in (most, most + 1):
        value: Any = [8] * number if key == "block_out_channels" else number
        with changed(plain / part / "config.json", **{key: value}):
            if number > most:
                with pytest.raises(BundleError, match=f"{key}, which must be .* 1 to {most}"):
                    draw(plain)
                continue
            read = bundle.levels(part) if key == "block_out_channels" else bundle.number(part, key, most)
            assert read == number
            with contextlib.suppress(VegaEdgeError):
                draw(plain)


def test_the_longest_training_that_is_read(plain: Path) -> None:
    """Both sides of the limit; as many timesteps with Stable Diffusion's betas leave no signal in single precision."""
    path = plain / "scheduler/scheduler_config.json"
    config = {"trained_betas": None, "beta_start": 1e-6, "beta_end": 1e-5}
    with changed(path, num_train_timesteps=MAX_TIMESTEPS, **config):
        assert len(draw(plain, scheduler="Euler").images) == 1
    with changed(path, num_train_timesteps=MAX_TIMESTEPS + 1, **config), pytest.raises(BundleError):
        draw(plain, scheduler="Euler")
    with changed(path, num_train_timesteps=MAX_TIMESTEPS), pytest.raises(UsageError, match="noise levels"):
        draw(plain, scheduler="Euler")


def test_a_model_distilled_on_as_many_steps_as_it_was_trained_on(plain: Path) -> None:
    config = {"num_train_timesteps": 10, "trained_betas": None}
    path = plain / "scheduler/scheduler_config.json"
    lcm = get_scheduler("LCM")
    schedule = lcm.schedule(lcm.noise_model({**config, "original_inference_steps": 10}), 4)
    assert schedule.timesteps.min() >= 0 and len(set(schedule.timesteps)) == 4
    with changed(path, **config, original_inference_steps=11), pytest.raises(BundleError, match="at most"):
        draw(plain, scheduler="LCM")
    with pytest.raises(UsageError, match="original_inference_steps is 50 and num_train_timesteps 10"):
        lcm.schedule(lcm.noise_model(config), 4)  # 50 where the file has no number


def test_what_diffusers_writes_is_taken() -> None:
    assert fault_in({"final_sigmas_type": None, "original_inference_steps": 1000}) is None


def test_trained_betas_are_drawn_with(plain: Path) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    path = plain / "scheduler/scheduler_config.json"
    with changed(path, beta_start=0.5, beta_end=0.6, trained_betas=betas.tolist()):
        got = draw(plain, steps=2, scheduler="Euler")
    assert np.abs(got.latents - draw(plain, steps=2, scheduler="Euler").latents).max() < 1e-4
    with changed(path, num_train_timesteps=100, trained_betas=betas[::10].tolist()):
        assert np.isfinite(draw(plain, steps=2, scheduler="Euler").latents).all()
