"""From a request to latents without a bundle: what each option does, batches, ends, errors, threads."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vega_edge.engines import Spec
from vega_edge.errors import EngineError, NotFiniteError, UsageError
from vega_edge.runtime import walk as walks
from vega_edge.runtime.denoiser import Denoiser, rescaled
from vega_edge.runtime.prefetch import Prefetch
from vega_edge.runtime.request import Limits, Request, make_request
from vega_edge.runtime.rng import NoiseSource
from vega_edge.runtime.samplers import Step
from vega_edge.runtime.schedulers import all_schedulers, get_scheduler
from vega_edge.runtime.walk import Network, make_plan

from .fakes import VEGA, NetworkEngine, network

DEFAULTS = {"scheduler": "Euler", "steps": 5, "guidance": 0.0, "width": 64, "height": 64}
SHAPE = (4, 8, 8)
STOCHASTIC = sorted({(s.name, s.family) for s in all_schedulers() if s.stochastic})


class PromptedEngine(NetworkEngine):
    """A fake network that also hears a prompt, a number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs["prompt"] = Spec(np.dtype(np.float32), (None, 1))
        self.batches: list[int] = []

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        self.batches.append(len(feeds["sample"]))
        said = super().run(feeds)["out_sample"]
        return {"out_sample": said * (1 + 0.2 * feeds["prompt"].reshape(-1, 1, 1, 1))}


def request(**options: Any) -> Request:
    return make_request({"prompt": "a star", "seed": 40, **options}, DEFAULTS, Limits())


def walk(asked: Request, engine: NetworkEngine | None = None, config: dict[str, Any] = VEGA) -> list[Step]:
    engine = engine or PromptedEngine()
    prompts = [*[0.5] * asked.samples, *[2.0] * asked.samples] if asked.guidance > 1 else [2.0] * asked.samples
    feeds = {"prompt": np.array(prompts, np.float32)[:, None]} if "prompt" in engine.inputs else {}
    return list(walks.walk(asked, make_plan(asked, config), Network(engine, "a fake", SHAPE), feeds))


def final(**options: Any) -> np.ndarray:
    return walk(request(**options))[-1].x


# -- every scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", all_schedulers(), ids=lambda row: f"{row.family}-{row.name}")
@pytest.mark.parametrize("steps", [4, 21])
def test_a_batch_is_the_samples_of_its_seeds(row: Any, steps: int) -> None:
    options = {"scheduler": row.name, "family": row.family, "steps": steps, "guidance": 3.0, "guidance_rescale": 0.3}
    batch = walk(request(samples=3, **options))
    for i in range(3):
        alone = walk(request(seed=40 + i, **options))
        assert np.abs(batch[-1].x[i] - alone[-1].x[0]).max() < 1e-4
    total = make_plan(request(**options), VEGA).total
    assert total == (None if row.name == "DPM adaptive" else len(batch))
    assert batch[-1].x.dtype == np.float32 and np.isfinite(batch[-1].x).all()


def test_adaptive_samples_walk_apart_and_wait_for_each_other() -> None:
    options = {"scheduler": "DPM adaptive", "eta": 0.0}
    lengths = [len(walk(request(seed=40 + i, **options))) for i in range(3)]
    together = walk(request(samples=3, **options))
    assert len(together) == max(lengths)
    assert all(step.x.shape == step.x0.shape == (3, *SHAPE) for step in together)
    assert all(a.sigma >= b.sigma for a, b in pairwise(together))


def test_a_named_schedule_counts_its_own_steps() -> None:
    assert make_plan(request(scheduler="PLMS", steps=10), VEGA).total == 9
    asked = request(scheduler="PLMS", steps=10, schedule="karras")
    assert make_plan(asked, VEGA).total == len(walk(asked)) == 10


# -- options ----------------------------------------------------------------------------------------------------------


def test_eta_scales_the_fresh_noise() -> None:
    none, half, whole = (final(scheduler="Euler a", eta=eta) for eta in (0.0, 0.5, None))
    assert np.abs(none - final(scheduler="Euler")).max() < 1e-4  # without noise Euler a is Euler
    assert np.array_equal(whole, final(scheduler="Euler a", eta=1.0))
    assert np.abs(half - none).max() > 0.1 and np.abs(half - whole).max() > 0.1


def test_the_family_decides_what_a_name_means() -> None:
    ours, theirs = (walk(request(scheduler="Euler", family=f))[0].sigma for f in ("diffusers", "a1111"))
    assert ours != theirs
    with pytest.raises(UsageError) as error:
        request(scheduler="PLMS", family="diffusers")
    assert str(error.value) == "PLMS is not in the family diffusers; it is in a1111"
    assert request(scheduler="PLMS").family == "a1111"  # the only one that has it


def test_a_schedule_for_any_sampler() -> None:
    asked = request(scheduler="DPM++ 2M", schedule="Karras", steps=8)
    theirs = get_scheduler("DPM++ 2M Karras", "a1111")
    levels = theirs.schedule(theirs.noise_model(VEGA), 8).sigmas[1:]
    assert asked.schedule == "karras"
    assert np.allclose([s.sigma for s in walk(asked)], levels)


@pytest.mark.parametrize(("rng", "dtype"), [("torch", "fp32"), ("torch", "fp16"), ("nv", "fp32"), ("nv", "fp16")])
@pytest.mark.parametrize(("name", "family"), [("Euler a", "diffusers"), ("DPM++ 2M SDE", "a1111")])
def test_noise_comes_from_the_chosen_source(name: str, family: str, rng: str, dtype: str) -> None:
    asked = request(scheduler=name, family=family, rng=rng, noise_dtype=dtype, samples=2)
    plan, source = make_plan(asked, VEGA), NoiseSource([40, 41], rng, dtype)
    denoise = Denoiser(NetworkEngine(), plan.schedule, {}, 0.0, "epsilon")
    x = source(SHAPE) * np.float32(plan.schedule.scale)
    levels = plan.schedule.sigmas
    tree = source.brownian(SHAPE, levels[-2], levels[0])
    noise = tree if plan.scheduler.brownian else lambda a, b: source(SHAPE)
    *_, expected = plan.scheduler.sampler(denoise, x, plan.schedule, noise)
    assert np.array_equal(walk(asked, NetworkEngine())[-1].x, expected.x)


def test_sde_samplers_walk_along_one_brownian_path() -> None:
    """With the network saying nothing, all that is left at the end is the path: two step counts agree on where."""

    class Silent(NetworkEngine):
        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            return {"out_sample": feeds["sample"] * 0}

    few, many = (
        walk(request(scheduler="DPM++ 2M SDE Karras", steps=n), Silent())[-1].x.ravel() for n in (40, 80)
    )  # fmt: skip
    assert np.corrcoef(few, many)[0, 1] > 0.8
    others = walk(request(scheduler="DPM++ 2M SDE Karras", steps=80, seed=1), Silent())[-1].x.ravel()
    assert abs(np.corrcoef(few, others)[0, 1]) < 0.2


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 1), (1.0, 1), (1.01, 2)])
def test_guidance_of_one_and_less_asks_the_network_once(guidance: float, rows: int) -> None:
    engine = PromptedEngine()
    walk(request(guidance=guidance), engine)
    assert engine.batches == [rows] * 5


def test_guidance_rescale() -> None:
    rng = np.random.default_rng(3)
    prompted, away = (rng.standard_normal((2, *SHAPE), dtype=np.float32) for _ in range(2))
    guided = away + 7.5 * (prompted - away)
    whole = rescaled(guided, prompted, 1.0)
    assert np.allclose(whole.std((1, 2, 3)), prompted.std((1, 2, 3)), atol=1e-5)
    assert np.allclose(rescaled(guided, prompted, 0.25), 0.25 * whole + 0.75 * guided, atol=1e-5)
    plain, some, all_ = (final(guidance=7.5, guidance_rescale=r) for r in (0.0, 0.5, 1.0))
    assert np.abs(plain - some).max() > 0.01 and np.abs(all_ - some).max() > 0.01


@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(share: float) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl")
    rng = np.random.default_rng(4)
    prompted, guided = (rng.standard_normal((3, *SHAPE), dtype=np.float32) * s for s in (1, 5))
    theirs = module.rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(prompted), share).numpy()
    assert np.abs(rescaled(guided, prompted, share) - theirs).max() < 1e-5


def test_rescale_is_of_the_prompted_half() -> None:
    engine, schedule = PromptedEngine(), make_plan(request(), VEGA).schedule
    x, sigma = np.random.default_rng(5).standard_normal((1, *SHAPE), dtype=np.float32) * 9, float(schedule.sigmas[1])
    feeds = {"prompt": np.array([[0.5], [2.0]], np.float32)}
    denoise = Denoiser(engine, schedule, feeds, 5.0, "epsilon", rescale=1.0)
    said = (x - denoise(x, sigma)) / sigma
    wanted = network(x / np.float32(np.hypot(1, sigma)), schedule.timestep(sigma)) * 1.4
    assert said.std() == pytest.approx(wanted.std(), rel=1e-3)


# -- the end of a walk ------------------------------------------------------------------------------------------------


def test_ends_above_zero_keep_each_family_s_form() -> None:
    """Variance-preserving samplers hand over x / sqrt(1 + sigma^2), k-diffusion's x as it is."""
    for name, preserving in (("DDIM", True), ("DPM fast", False), ("DPM adaptive", False)):
        asked = request(scheduler=name, eta=0.0)
        plan = make_plan(asked, VEGA)
        denoise = Denoiser(NetworkEngine(), plan.schedule, {}, 0.0, "epsilon")
        x = NoiseSource([40])(SHAPE) * np.float32(plan.schedule.scale)
        *_, last = plan.scheduler.sampler(denoise, x, plan.schedule, _no_noise)
        assert last.sigma > 0.02
        scale = np.hypot(1, last.sigma) if preserving else 1
        assert np.allclose(walk(asked, NetworkEngine())[-1].x, last.x / scale, rtol=1e-6), name


@pytest.mark.parametrize("name", ["Euler", "DPM Multi", "DDIM"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ends_above_zero_are_those_of_diffusers(name: str, spacing: str) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = {**VEGA, "final_sigmas_type": "sigma_min", "timestep_spacing": spacing}
    theirs = getattr(diffusers, str(get_scheduler(name).diffusers)).from_config(config)
    theirs.set_timesteps(6)
    x = torch.from_numpy(NoiseSource([40])((1, *SHAPE))[0]) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        said = network(theirs.scale_model_input(x, t).numpy(), float(t))
        x = theirs.step(torch.from_numpy(said), t, x).prev_sample
    ours = walk(request(scheduler=name, steps=6), NetworkEngine(), config)[-1].x
    assert np.abs(ours - x.numpy()).max() < 1e-4 * np.abs(ours).max()


# -- errors and threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "call", "step"), [("Euler", 1, 1), ("Euler", 3, 3), ("Heun", 4, 2), ("Heun", 5, 3)]
)
def test_values_that_are_not_finite_name_the_step_and_the_engine(scheduler: str, call: int, step: int) -> None:
    class Broken(NetworkEngine):
        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            out = super().run(feeds)["out_sample"]
            if len(self.timesteps) == call:
                out[-1, -1, -1, -1] = np.inf if call == 3 else np.nan
            return {"out_sample": out}

    with pytest.raises(NotFiniteError) as error:
        walk(request(scheduler=scheduler, family="diffusers"), Broken())
    assert f"a fake gave values that are not finite at step {step} (sigma " in str(error.value)
    assert str(error.value).endswith("; a precision with more range may help: --engine onnxruntime-cpu")
    assert isinstance(error.value, EngineError)


def test_a_network_that_takes_whole_timesteps_gets_the_nearest() -> None:
    """optimum's exports do; cut off, 665.99 would be another level."""

    class Whole(NetworkEngine):
        def __init__(self) -> None:
            super().__init__()
            time = self.inputs["timestep"]
            self.inputs = {**self.inputs, "timestep": Spec(np.dtype(np.int64), time.shape)}

    exact, whole = NetworkEngine(), Whole()
    for engine in (exact, whole):
        walk(request(scheduler="Euler", schedule="normal", steps=7), engine)
    assert any(t != round(t) for t in exact.timesteps)
    assert [int(t) for t in whole.timesteps] == [round(t) for t in exact.timesteps]


@pytest.mark.parametrize(("options", "message"), [
    ({"scheduler": "UniPC", "family": "a1111", "steps": 2}, "UniPC takes 3 to 1000 steps, got 2"),
    ({"scheduler": "Restart", "schedule": "karras"}, "Restart makes its own schedule and can't use 'karras'"),
    ({"scheduler": "LCM", "steps": 51}, "this model was distilled on 50 steps and can't take 51; allowed: 1 to 50"),
])  # fmt: skip
def test_what_the_sampler_can_t_walk(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(request(**options), VEGA)
    assert str(error.value) == message


def _no_noise(sigma: float, sigma_next: float) -> np.ndarray:
    raise AssertionError("eta is 0")


def noise_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("noise")]


@pytest.mark.parametrize("scheduler", ["Euler a", "DPM++ 2M SDE", "DPM adaptive"])
def test_an_abandoned_walk_leaves_no_thread(scheduler: str) -> None:
    asked = request(scheduler=scheduler, samples=2)
    steps = walks.walk(asked, make_plan(asked, VEGA), Network(NetworkEngine(), "a fake", SHAPE), {})
    next(steps)
    assert noise_threads()
    steps.close()
    assert not noise_threads()
    walk(asked, NetworkEngine())
    assert not noise_threads()


def test_a_sampler_that_draws_nothing_starts_no_thread() -> None:
    asked = request(scheduler="Euler a", eta=0.0)
    steps = walks.walk(asked, make_plan(asked, VEGA), Network(NetworkEngine(), "a fake", SHAPE), {})
    next(steps)
    assert not noise_threads()


def test_the_noise_is_drawn_while_the_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = threading.Semaphore(0), NoiseSource.__call__

    def counted(self: NoiseSource, shape: tuple[int, ...]) -> np.ndarray:
        array = draw(self, shape)
        if threading.current_thread() is not threading.main_thread():
            drawn.release()
        return array

    class Waiting(NetworkEngine):
        def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            assert drawn.acquire(timeout=10), "the step's noise was not drawn before the network came back"
            return super().run(feeds)

    monkeypatch.setattr(NoiseSource, "__call__", counted)
    assert len(walk(request(scheduler="Euler a", steps=4), Waiting())) == 4


@pytest.mark.parametrize("scheduler", ["DPM++ SDE", "DPM++ 2M SDE Karras", "DPM++ 3M SDE"])
def test_all_of_a_brownian_path_is_drawn_ahead(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the next interval is not the foreseen one, the walk would wait for its draw."""
    foreseen: list[bool] = []

    class Watched(Prefetch):
        def __call__(self, sigma: float, sigma_next: float) -> np.ndarray:
            foreseen.append(self._ready is not None and self._expected == (sigma, sigma_next))
            return super().__call__(sigma, sigma_next)

    monkeypatch.setattr(walks, "Prefetch", Watched)
    walk(request(scheduler=scheduler, steps=5), NetworkEngine())
    assert foreseen and all(foreseen)


def test_interleaved_walks_equal_separate_ones() -> None:
    asked = [request(scheduler=name, steps=6) for name in ("Euler a", "DPM++ 2M SDE")]
    running = [walks.walk(a, make_plan(a, VEGA), Network(NetworkEngine(), "a fake", SHAPE), {}) for a in asked]
    last = list(zip(*running, strict=True))[-1]
    for a, step in zip(asked, last, strict=True):
        assert np.array_equal(step.x, walk(a, NetworkEngine())[-1].x)
