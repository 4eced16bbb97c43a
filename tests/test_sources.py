"""Every way to name what is exported: recipes, hub, pickles, random weights; and two exports from end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from diffusers import UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from vega_edge.cli import main  # noqa: E402
from vega_edge.errors import CheckpointError, ExportError, UsageError, VegaEdgeError  # noqa: E402
from vega_edge.export import export_bundle, lora_places, model_source, sources, tiny_vae_place  # noqa: E402
from vega_edge.export.checkpoint import load_module  # noqa: E402
from vega_edge.export.random_weights import RandomWeights  # noqa: E402
from vega_edge.models import Origin, recipes  # noqa: E402
from vega_edge.runtime.pipeline import Pipeline  # noqa: E402

from .hub_server import COMMIT, Hub, serve  # noqa: E402

STEMS = {"text_encoder": ("model", "pytorch_model")}


def test_names(tmp_path: Path) -> None:
    assert model_source(tmp_path / "x").place == tmp_path / "x"
    for text, origin in {
        "hf:segmind/tiny-sd": Origin("segmind/tiny-sd"),
        "hf:segmind/tiny-sd@fp16": Origin("segmind/tiny-sd", "fp16"),
        "hf:a/b@0123/sub/c.safetensors": Origin("a/b", "0123", "sub/c.safetensors"),
        "hf:a.c/b-d/e.safetensors": Origin("a.c/b-d", None, "e.safetensors"),
    }.items():
        source = model_source(text)
        assert (source.place, source.name) == (origin, str(origin).removeprefix("hf:"))
    vega = model_source("segmind-vega")
    assert vega.place == recipes()["segmind-vega"].sources[0] and vega.name == "segmind/Segmind-Vega@7714c43"
    elsewhere = model_source("segmind-vega", start="hf:mirror/Vega")
    assert elsewhere.place == Origin("mirror/Vega") and elsewhere.recipe == recipes()["segmind-vega"]
    for text, message in {
        "hf:segmind": "'hf:segmind' names no hub repository; it is hf:OWNER/NAME, hf:OWNER/NAME@REVISION or .../FILE",
    }.items():
        with pytest.raises(UsageError) as caught:
            model_source(text)
        assert str(caught.value) == message
    with pytest.raises(UsageError) as caught:
        model_source("vega", start="x")
    assert str(caught.value) == f"--from goes with a model's name; vega is none of: {', '.join(recipes())}"


def test_a_recipes_loras_and_then_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [(Path("own"), 0.5)]
    on_hub = Origin("segmind/Segmind-VegaRT", None, "pytorch_lora_weights.safetensors")
    assert lora_places(model_source("segmind-vegart"), own) == [(on_hub, 1.0), *own]
    assert lora_places(model_source("segmind-vegart", random_weights=0), own) == own
    assert lora_places(model_source("somewhere"), own) == own
    monkeypatch.setattr(sources, "fetch_file", lambda origin: Path(f"fetched/{origin.file}"))
    assert sources.lora_file(on_hub) == Path("fetched/pytorch_lora_weights.safetensors")
    assert sources.lora_file(Path("own")) == Path("own")

    def fail(_: Origin) -> Path:
        raise CheckpointError("no network")

    monkeypatch.setattr(sources, "fetch_file", fail)
    with pytest.raises(CheckpointError) as caught:
        sources.lora_file(on_hub)
    assert str(caught.value) == (
        "no network; it is a LoRA of the model: with a copy of it, export the base model with --lora FILE"
    )


def test_nothing_is_fetched_before_the_other_arguments_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "fetch_file", lambda _: pytest.fail("fetched"))
    monkeypatch.setattr(sources, "fetch_folder", lambda *_, **__: pytest.fail("fetched"))
    source = model_source("segmind-vegart")
    loras = lora_places(source)
    with pytest.raises(UsageError, match="unknown dtype 'foo'"):
        export_bundle(source, tmp_path / "x", loras=loras, dtype="foo")
    with pytest.raises(ExportError, match="does not exist; create that folder first"):
        export_bundle(source, tmp_path / "none" / "x", loras=loras)
    with pytest.raises(UsageError) as caught:
        model_source("segmind-vega", start="x", random_weights=0)
    assert str(caught.value) == (
        "--from names trained weights and --random-weights makes some up; leave one of them out"
    )


def test_a_tiny_autoencoder_is_a_folder_or_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch_network", lambda origin, part, **_: Path(f"{origin}/{part}"))
    assert sources.tiny_vae_folder(tiny_vae_place("some/folder")) == Path("some/folder")
    named = tiny_vae_place("hf:madebyollin/taesdxl@main")
    assert sources.tiny_vae_folder(named) == Path("hf:madebyollin/taesdxl@main/tiny_vae")
    with pytest.raises(UsageError) as caught:
        tiny_vae_place("hf:a/b/c.safetensors")
    assert str(caught.value) == (
        "'hf:a/b/c.safetensors' names one file; a tiny autoencoder is a folder, or a repository: hf:OWNER/NAME"
    )


def test_a_file_the_user_must_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    source = model_source("dynavis-lightning")
    source = dataclasses.replace(source, name="dynavis-lightning", place=Origin(file="Dynavis.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        source.open()
    assert str(caught.value) == (
        f"dynavis-lightning needs {tmp_path / 'checkpoints' / 'Dynavis.safetensors'}, which can't be downloaded by "
        "name; put it there, or name it with --from FILE"
    )


def test_a_recipe_that_can_not_be_fetched_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(origin: Origin, **_: Any) -> Path:
        raise CheckpointError(f"{origin} is gone; look elsewhere")

    monkeypatch.setattr(sources, "fetch_file", gone)
    monkeypatch.setattr(sources, "fetch_folder", gone)
    for name, place in {
        "dynavis-lightning": "kg-09/lightning_models/Dyanvis_lightning.safetensors",
        "tiny-sd": "segmind/tiny-sd",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            model_source(name).open()
        assert str(caught.value) == (
            f"hf:{place} is gone; look elsewhere; weights that you have elsewhere are named with --from"
        )
    with pytest.raises(CheckpointError) as caught:
        model_source("hf:a/b").open()
    assert str(caught.value) == "hf:a/b is gone; look elsewhere"
    with pytest.raises(ExportError) as refused:
        model_source("hf:a/b/c.ckpt").open()
    assert str(refused.value) == (
        "hf:a/b/c.ckpt is pickled, which can run any code when it is read; if you trust it, --allow-pickle reads it "
        "with torch's weights_only"
    )


def pickled(folder: Path, target: Path, part: str) -> Path:
    """A copy of a checkpoint with one part's weights pickled, and not contiguous, as distill-sd's are."""
    shutil.copytree(folder, target)
    safe, bin_ = STEMS.get(part, ("diffusion_pytorch_model",) * 2)
    path = target / part / f"{safe}.safetensors"
    state = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in load_file(path).items()}
    torch.save(state, target / part / f"{bin_}.bin")
    path.unlink()
    return target / part / f"{bin_}.bin"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_parts(checkpoint: Path, tmp_path: Path, part: str) -> None:
    path = pickled(checkpoint, tmp_path / "x", part)
    with pytest.raises(ExportError, match=r"holds only pickled weights \(\w+\.bin\)"):
        model_source(tmp_path / "x").open()
    wanted, got = model_source(checkpoint).open(), model_source(tmp_path / "x", allow_pickle=True).open()
    assert got.pickles == {part: (path,)} and got.weight_shapes(part) == wanted.weight_shapes(part)
    modules = [load_module(c, part) for c in (wanted, got)]
    for (name, a), (_, b) in zip(*(m.state_dict().items() for m in modules), strict=True):
        assert torch.equal(a, b) and b.is_contiguous(), name


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["folder", "single"])
def test_a_pickle_that_would_run_code_does_not(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "ran"
    if kind == "folder":
        path, source = pickled(checkpoint, tmp_path / "x", "unet"), tmp_path / "x"
    else:
        path = source = tmp_path / "model.ckpt"
    for save in (lambda v: torch.save(v, path), lambda v: path.write_bytes(pickle.dumps(v))):
        save({"state_dict": {"conv_in.weight": torch.zeros(1), "attack": _Attack(mark)}})
        with pytest.raises(VegaEdgeError) as caught:
            load_module(model_source(source, allow_pickle=True).open(), "unet")
        assert str(caught.value) == (
            f"{path} holds more than weights, which torch's weights_only refuses; use a .safetensors version, or "
            "convert it where you trust it"
        )
        assert not mark.exists()


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    for content, text in (
        (b"", "is damaged, or no file of weights; fetch it again"),
        (b"PK\x03\x04 and nothing else", "is damaged, or no file of weights; fetch it again"),
        (None, "holds no weights; expected tensors by name, or a state_dict of them"),
    ):
        if content is None:
            torch.save([1, 2], path)
        else:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            model_source(path, allow_pickle=True).open()
        assert str(caught.value) == f"{path} {text}"


def test_random_weights_depend_on_seed_and_name_only(checkpoint: Path) -> None:
    seven = model_source(checkpoint, random_weights=7).open()
    assert seven.random_weights == 7 and set(seven.loaders) == {"unet", "vae", "text_encoder"}
    a = load_module(seven, "unet").state_dict()
    torch.manual_seed(99)
    load_module(seven, "vae")
    b = load_module(model_source(checkpoint, random_weights=7).open(), "unet").state_dict()
    c = load_module(model_source(checkpoint, random_weights=8).open(), "unet").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a) and not any(torch.equal(a[n], c[n]) for n in a)
    assert all(torch.equal(t, t.half().float()) for t in a.values())
    for name, shape in seven.weight_shapes("unet").items():
        assert tuple(a[name].shape) == shape
        if len(shape) == 4 and a[name].numel() > 1000:
            fan_in = shape[1] * shape[2] * shape[3]
            assert float(a[name].std()) == pytest.approx(fan_in**-0.5, rel=0.1) and abs(float(a[name].mean())) < 0.02
    # the same on every machine and in every version: bundles that name a seed mean something
    assert a["conv_in.bias"][:3].tolist() == [0.024658203125, 0.037017822265625, 0.015625]


def test_random_weights_of_a_folder_need_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors"))
    assert model_source(tmp_path / "x", random_weights=0).open().weight_shapes("vae")
    file = tmp_path / "single.safetensors"
    file.touch()
    for source, name in (("hf:hub/x", "hub/x"), (file, "single.safetensors")):
        with pytest.raises(UsageError) as caught:
            model_source(source, random_weights=0).open()
        assert str(caught.value) == f"{name}: random weights need a model's name or a diffusers folder"


@pytest.mark.parametrize("name", ["segmind-vegart", "tiny-sd", "dynavis-lightning"])
def test_random_weights_of_a_recipe_are_its_exact_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    checkpoint = model_source(name, random_weights=0).open()
    for part, count in recipes()[name].parameters.items():
        shapes = checkpoint.weight_shapes(part)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    spacing = checkpoint.scheduler.get("timestep_spacing")
    assert spacing == {"segmind-vegart": "leading", "tiny-sd": None, "dynavis-lightning": "trailing"}[name]


def test_random_networks_as_deep_as_sdxls_stay_in_range() -> None:
    """SDXL's depth with 1/10 of its width: outputs that fp16 holds, and that depend on every input."""
    unet = {
        "sample_size": 16, "block_out_channels": [32, 64, 128], "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [4, 4, 4], "cross_attention_dim": 64, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
    }  # fmt: skip
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 32, "num_attention_heads": 4}
    loader = RandomWeights(0, {"unet": unet, "text_encoder": {**text, "vocab_size": 1000}})
    encoder, network = loader.load("text_encoder").float().eval(), loader.load("unet").float().eval()
    assert isinstance(network, UNet2DConditionModel)
    with torch.no_grad():
        hidden = encoder(torch.arange(77)[None] % 1000, output_hidden_states=True).hidden_states[-2]
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        outputs = [
            network(x, t, encoder_hidden_states=h).sample for t, h in ((999, hidden), (1, hidden), (999, -hidden))
        ]
    assert float(hidden.std()) > 0.1 and float(hidden.abs().max()) < 100
    for out in outputs:
        assert 0.1 < float(out.std()) < 10 and torch.isfinite(out).all()
    assert all(float((a - outputs[0]).abs().mean()) > 0.01 for a in outputs[1:])


def test_a_recipes_lora_is_left_out_of_random_weights_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: Any, loras: Any, **__: Any) -> Any:
        assert loras == []
        raise ExportError("enough")

    monkeypatch.setattr("vega_edge.export.export_bundle", export)
    lines = {
        "segmind-vegart": "vega-edge: the LoRA of segmind-vegart is left out: fused, it would change made-up numbers and "
        "no shape; --lora FILE adds one\n",
        "segmind-vega": "",
    }
    for name, line in lines.items():
        assert main(["export", name, "--random-weights", "3", "-o", str(tmp_path / "x")]) == 1
        assert capsys.readouterr().err == line + "vega-edge: enough\n"


def test_an_export_with_random_weights_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    assert main(["export", "tiny-sd", "--random-weights", "3"]) == 2
    assert capsys.readouterr().err == ("vega-edge: say where the bundle goes: vega-edge export tiny-sd -o BUNDLE\n")
    assert main(["export", str(checkpoint), "--random-weights", "3", "-o", str(bundle)]) == 0
    manifest = json.loads((bundle / "vega-edge.json").read_text())
    assert manifest["source"] == {"model": "tiny-sd", "loras": [], "vae": "full", "random_weights": 3}
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "generate",
                "a cat",
                "--model",
                str(bundle),
                "--steps",
                "1",
                "--size",
                "64x64",
                "--engine",
                "onnxruntime-cpu",
            ]
        )
        == 0
    )
    assert f"vega-edge: {bundle} has random weights (seed 3): its pictures mean nothing\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "tiny-sd", "--random-weights", "-1", "-o", "x"])
    assert "must be a whole number from 0 to 999999999999999, got '-1'" in capsys.readouterr().err


def test_from_the_hub_to_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    """The command line, in a process of its own: download, export, draw."""
    bundle, cache = tmp_path / "bundle", tmp_path / "cache"
    with serve(Hub(checkpoint)) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "vega_edge", "export", "hf:tiny/model", "-o", str(bundle)],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "NO_PROXY": "*"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{bundle}\n"
        assert "tiny/diffusion_pytorch_model.safetensors" not in hub.fetched()
    assert (cache / "models--tiny--model" / "refs" / "main").read_text() == COMMIT
    assert json.loads((bundle / "vega-edge.json").read_text())["source"]["model"] == "tiny/model"
    assert Pipeline.open(bundle, "onnxruntime-cpu")("a cat", steps=2, width=64, height=64).images[0].size == (64, 64)
