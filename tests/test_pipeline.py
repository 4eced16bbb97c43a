"""The pipeline's own behaviour, on the embedded few-step model."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from vega_edge.bench.meaning_prompts import judge, prompts
from vega_edge.bundle import Bundle
from vega_edge.engines import Spec
from vega_edge.errors import EngineError, NotFiniteError, UsageError
from vega_edge.models import find_bundle, recipes
from vega_edge.runtime.decoder import Decoder
from vega_edge.runtime.parts import Part, Parts
from vega_edge.runtime.pipeline import Pipeline

STAR = "a big red star on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.open("demo-vegart", engine="onnxruntime-cpu")


def test_it_draws_what_it_is_told(pipe: Pipeline) -> None:
    asked = prompts("seen", 32)
    drawn = [pipe(one.text, seed=i).images[0] for i, one in enumerate(asked)]
    right = sum(judge(np.asarray(image), one).all for image, one in zip(drawn, asked, strict=True))
    assert right >= 24  # nine in ten are right (demo/README.md); by chance it would be one in a thousand


def test_streaming_counts_previews_and_ends_where_a_call_ends(pipe: Pipeline) -> None:
    steps = list(pipe.stream(STAR, steps=4, seed=7))
    assert [(s.index, s.total) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].preview()[0].size == (128, 128)
    assert np.array_equal(steps[-1].latents, pipe(STAR, steps=4, seed=7).latents)


def test_stopping_early_changes_nothing_for_the_next(pipe: Pipeline) -> None:
    expected = pipe(STAR, seed=7).latents
    next(pipe.stream(STAR, seed=9))
    two = pipe.stream(STAR, seed=7), pipe.stream(STAR, seed=8)
    last = list(zip(*two, strict=True))[-1]
    assert np.array_equal(last[0].latents, expected)


@pytest.mark.parametrize("scheduler", ["Euler", "Euler a", "LCM", "DPM++ 2M SDE Karras", "DPM adaptive"])
def test_a_batch_is_the_pictures_of_its_seeds(pipe: Pipeline, scheduler: str) -> None:
    options = {"steps": 3, "scheduler": scheduler, "guidance": 2.0}
    batch = pipe(STAR, seed=40, samples=3, **options).latents
    for i in range(3):
        assert np.abs(batch[i] - pipe(STAR, seed=40 + i, **options).latents[0]).max() < 1e-4


def test_other_sizes(pipe: Pipeline) -> None:
    assert pipe(STAR, width=192, height=128).images[0].size == (192, 128)
    with pytest.raises(UsageError) as error:
        pipe(STAR, width=144)
    assert str(error.value) == "width must be a multiple of 32 px, got 144; nearest: 128 or 160"


def test_random_seeds_differ_and_are_told(pipe: Pipeline) -> None:
    first, second = (pipe(STAR, steps=1).request.seed for _ in range(2))
    assert first != second and first >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stepss": 3},
            "unknown option 'stepss'; there are: eta, family, guidance, ",
        ),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 50, got 2.5"),
        ({"steps": True}, "steps must be a whole number from 1 to 50, got True"),
        ({"guidance": "7"}, "guidance must be a number from 0 to 20, got '7'"),
        ({"guidance": float("inf")}, "guidance must be a number from 0 to 20, got inf"),
        ({"negative": 3}, "negative must be text, got int"),
        ({"prompt": None}, "prompt must be text, got NoneType"),
        (
            {"seed": 999_999_999_999_999, "samples": 2},
            "seed, the first of 2, must be a whole number from -1 to 999999999999998, got 999999999999999",
        ),
        ({"scheduler": "DDIMM"}, "unknown scheduler 'DDIMM'; did you mean 'DDIM'? there are: "),
        ({"scheduler": "Restart", "schedule": "karras"}, "Restart makes its own schedule and can't use 'karras'"),
        ({"scheduler": "UniPC", "family": "a1111", "steps": 1}, "UniPC takes 3 to 50 steps, got 1"),
        ({"scheduler": "Euler a", "eta": 2}, "eta must be a number from 0 to 1, got 2"),
    ],
)
def test_options_are_checked(pipe: Pipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        pipe(**{"prompt": STAR, **options})
    assert str(error.value).startswith(message)


def test_numbers_of_numpy_and_halves_of_letters_are_taken(pipe: Pipeline) -> None:
    request = pipe.request("\ud83c star", steps=np.int64(2), seed=np.uint8(7), negative="\udc00")
    assert (request.prompt, request.negative, request.steps, request.seed) == ("\ufffd star", "\ufffd", 2, 7)
    assert "Negative prompt: \ufffd" in request.parameters("m", "1").splitlines()


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "FooScheduler"])
def test_a_bundle_without_defaults_draws(tmp_path: Path, scheduler: str) -> None:
    """As `vega-edge export FOLDER -o BUNDLE` writes it; its configuration may name a scheduler that is not here."""
    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    manifest = json.loads((bundle / "vega-edge.json").read_text())
    manifest |= {"defaults": {}, "limits": {}}
    config = bundle / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": scheduler}))
    entry = {"sha256": hashlib.sha256(config.read_bytes()).hexdigest(), "bytes": config.stat().st_size}
    manifest["parts"]["scheduler"]["files"]["scheduler/scheduler_config.json"] = entry
    (bundle / "vega-edge.json").write_text(json.dumps(manifest))
    opened = Pipeline.open(bundle, "onnxruntime-cpu")
    assert opened(STAR, steps=1, scheduler="LCM").images[0].size == (128, 128)
    if scheduler.startswith("Foo"):
        with pytest.raises(UsageError, match="names 'FooScheduler', which is not implemented; name one with"):
            opened.request(STAR)
    else:
        assert opened.request(STAR).scheduler == "Euler"


def test_a_sampler_that_chooses_its_steps_has_no_total(pipe: Pipeline) -> None:
    request = pipe.request(STAR, scheduler="DPM adaptive", seed=7)
    assert pipe.total(request) is None
    steps = list(pipe.stream(STAR, scheduler="DPM adaptive", seed=7))
    assert [s.index for s in steps] == list(range(1, len(steps) + 1)) and {s.total for s in steps} == {None}
    assert pipe.total(pipe.request(STAR, scheduler="DDIM", family="a1111", steps=4)) == 3


def test_the_options_reach_the_walk(pipe: Pipeline) -> None:
    options = {"scheduler": "Euler a", "guidance": 4.0, "steps": 4, "seed": 3}
    plain = pipe(STAR, **options).latents
    for change in (
        {"family": "a1111"}, {"schedule": "karras"}, {"eta": 0.5}, {"rng": "nv"}, {"noise_dtype": "fp16"},
        {"guidance_rescale": 0.7},
    ):  # fmt: skip
        assert not np.array_equal(plain, pipe(STAR, **options, **change).latents), change


def test_rescale_needs_guidance(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe(STAR, steps=1, guidance_rescale=0.5)
    assert caplog.messages == ["guidance rescale has no effect without guidance (guidance is 0)"]


def test_a_negative_prompt_needs_guidance(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe(STAR, steps=1, negative="a circle")
    assert caplog.messages == ["the negative prompt has no effect without guidance (guidance is 0)"]
    plain, pushed = (pipe(STAR, steps=2, seed=1, guidance=3.0, negative=n).latents for n in (None, "a circle"))
    assert np.abs(plain - pushed).max() > 1e-2


def test_a_foreign_bundle_without_our_files_draws_the_same(
    tmp_path: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    (bundle / "vega-edge.json").unlink()
    (bundle / "vae_decoder" / "pixels.onnx").unlink()
    foreign = Pipeline.open(bundle, engine="onnxruntime-cpu")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            f"{bundle} has no vega-edge.json: its files are not checked, and what is not asked for is 25 steps, "
            "guidance 7.5, 128x128 px, EulerDiscreteScheduler; that is right if another tool made it, else copy or "
            "export the bundle again",
        )
    ]
    request = foreign.request(STAR)
    assert (request.scheduler, request.steps, request.guidance, request.width) == ("Euler", 25, 7.5, 128)
    options = {"steps": 4, "scheduler": "LCM", "guidance": 0.0, "seed": 7}
    ours, theirs = (np.asarray(p(STAR, **options).images[0]).astype(int) for p in (pipe, foreign))
    assert np.abs(ours - theirs).max() <= 1


def test_nan_is_an_error_and_no_black_picture(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe._unet.running() as engine:

        class Broken:
            inputs, outputs = engine.inputs, engine.outputs

            def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                return {"out_sample": np.full_like(feeds["sample"], np.nan)}

    monkeypatch.setattr(pipe, "_unet", Part(Broken, keep=True))
    expected = r"onnxruntime-cpu gave values that are not finite at step 1 \(sigma 14\.6\d\); "
    with pytest.raises(NotFiniteError, match=expected):
        pipe(STAR)


@pytest.mark.parametrize("baked", [True, False])
def test_nor_is_one_from_the_decoder(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, baked: bool) -> None:
    """A graph that ends in whole numbers makes one colour of NaN; the float graph beside it tells."""

    class Broken:
        def __init__(self, ends_in_pixels: bool) -> None:
            self.ends_in_pixels = ends_in_pixels
            self.inputs = {"latent_sample": Spec(np.dtype(np.float32), (None, 4, None, None))}

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.ends_in_pixels:
                return {"pixels": np.zeros((1, 64, 64, 3), np.uint8)}
            return {"sample": np.full((1, 3, 64, 64), np.nan, np.float32)}

    decoder = pipe._decoder
    monkeypatch.setattr(decoder, "_bakes_pixels", baked)
    monkeypatch.setattr(decoder, "_part", Part(lambda: Broken(baked), keep=True))
    monkeypatch.setattr(decoder, "_floats", Part(lambda: Broken(False), keep=True))
    with pytest.raises(NotFiniteError) as error:
        pipe(STAR, steps=1, width=64, height=64)
    assert str(error.value) == (
        "onnxruntime-cpu: the decoder gave values that are not finite; it may overflow in fp16: export it in fp32"
    )


def test_the_users_own_export_goes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    (tmp_path / "bundles" / "demo-vegart").mkdir(parents=True)
    assert recipes()["demo-vegart"].bundle_path == tmp_path / "bundles" / "demo-vegart"


def test_latents_with_a_mean_and_a_deviation_a_channel(tmp_path: Path) -> None:
    """Some autoencoders' configurations have them: latents * std / scaling_factor + mean is what is decoded."""
    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    (bundle / "vega-edge.json").unlink()
    (bundle / "vae_decoder" / "pixels.onnx").unlink()
    config = bundle / "vae_decoder" / "config.json"
    plain = json.loads(config.read_text())
    mean, std = np.float32([0.5, -0.25, 0, 1]), np.float32([0.5, 1, 2, 0.75])
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16), dtype=np.float32)
    moved = latents * std[:, None, None] + mean[:, None, None] * np.float32(plain["scaling_factor"])
    expected = Decoder(Parts(Bundle.open(bundle), "onnxruntime-cpu")).pixels(moved).astype(int)
    config.write_text(json.dumps({**plain, "latents_mean": mean.tolist(), "latents_std": std.tolist()}))
    got = Decoder(Parts(Bundle.open(bundle), "onnxruntime-cpu")).pixels(latents).astype(int)
    assert np.abs(got - expected).max() <= 1


def test_a_model_by_name_or_path(caplog: pytest.LogCaptureFixture) -> None:
    with Pipeline.open(find_bundle("demo-vegart"), "onnxruntime-cpu") as opened:
        assert opened.name == "demo-vegart"
    with pytest.raises(EngineError, match=r"^this pipeline was closed; open it again$"):
        opened(STAR)
    assert not caplog.records
    with pytest.raises(UsageError, match="unknown model 'demo-vegar'; did you mean 'demo-vegart'"):
        Pipeline.open("demo-vegar")


def test_recipes_and_manifest_agree() -> None:
    manifest = json.loads((find_bundle("demo-vegart") / "vega-edge.json").read_text())
    recipe = recipes()["demo-vegart"]
    assert (manifest["defaults"], manifest["limits"]) == (recipe.defaults, recipe.limits)
    ours = [(hashlib.sha256(path.read_bytes()).hexdigest(), strength) for path, strength in recipe.lora_paths]
    assert [(lora["sha256"], lora["strength"]) for lora in manifest["source"]["loras"]] == ours


def test_what_is_no_request_is_refused(pipe: Pipeline) -> None:
    request = pipe.request("a star", steps=1)
    for wrong in ("x", None, request.prompt, 3):
        with pytest.raises(UsageError, match=r"Pipeline\.request"):
            pipe.run(wrong)  # type: ignore[arg-type]
    for several in ([], (), "x", [request, "x"], request, None):
        with pytest.raises(UsageError, match=r"Pipeline\.request"):
            pipe.draw(several)  # type: ignore[arg-type]


def test_results_and_steps_can_be_compared(pipe: Pipeline) -> None:
    """By what they are: two that were drawn alike are two."""
    one, other = (pipe("a star", steps=1, seed=1) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
    steps = [next(pipe.stream("a star", steps=1, seed=1)) for _ in range(2)]
    assert steps[0] != steps[1]


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_program_may_change_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Pipeline.open("bundle", "onnxruntime-cpu", memory=memory) as opened:
        expected = opened("a star", steps=1, seed=1).images[0]
        monkeypatch.chdir(tmp_path / "elsewhere")
        step = next(opened.stream("a star", steps=2, seed=1))
        assert step.preview()[0].size == expected.size
        assert np.array_equal(opened("a star", steps=1, seed=1).images[0], expected)
    assert opened.bundle.path == tmp_path / "bundle"


def test_a_lora_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    from vega_edge.bench.lora import random_lora

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    random_lora(Bundle.open(find_bundle("demo-vegart"), verify=False), Path("lora.safetensors"), rank=1)
    with Pipeline.open("demo-vegart", "onnxruntime-cpu", loras=[("lora.safetensors", 1.0)], memory="low") as opened:
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert opened("a star", steps=1).images


def test_a_folder_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vega_edge.engines.plan_store import PlanStore
    from vega_edge.models import storage

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("VEGA_EDGE_HOME", "VEGA_EDGE_ENGINES"):
        monkeypatch.setenv(variable, "~/kept")
    assert storage.home() == tmp_path / "kept"
    assert PlanStore(tmp_path / "bundle").folder.parent == tmp_path / "kept"
    monkeypatch.setenv("VEGA_EDGE_HOME", "relative")
    assert storage.home() == tmp_path / "relative"
    monkeypatch.setenv("VEGA_EDGE_HOME", "~nobody-of-this-name/kept")
    with pytest.raises(UsageError, match="nobody-of-this-name"):
        storage.home()
