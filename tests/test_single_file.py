"""Single-file checkpoints: tiny ones there and back, the real architectures by their names and shapes alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from vega_edge.errors import CheckpointError, ExportError, VegaEdgeError  # noqa: E402
from vega_edge.export import model_source, sources  # noqa: E402
from vega_edge.export.checkpoint import load_module, published_name  # noqa: E402
from vega_edge.export.detect import detect, shape_of, shape_of_config  # noqa: E402
from vega_edge.export.modules import new_module  # noqa: E402
from vega_edge.export.single_file import SingleFile  # noqa: E402
from vega_edge.ldm_names import ldm_names  # noqa: E402
from vega_edge.models.architectures import Architecture, architectures  # noqa: E402

from .original_layout import original  # noqa: E402

KINDS = ("xl", "sd")
STEMS = {"text_encoder": "model", "text_encoder_2": "model"}


class Tiny(Architecture):
    """An architecture whose configurations are those of a folder."""

    def config(self, part: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(Path(self.parts[part], "config.json").read_text())
        return value


def tiny(folder: Path, sdxl: bool) -> Tiny:
    parts = ("text_encoder", "text_encoder_2", "vae", "unet") if sdxl else ("text_encoder", "vae", "unet")
    kind = "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    return Tiny(folder.name, kind, {p: str(folder / p) for p in parts}, "scheduler-sdxl", {})


@pytest.fixture(scope="module")
def files(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    for kind, folder in checkpoints.items():
        save_file(original(folder, kind == "xl"), root / f"{kind}.safetensors")
    return {kind: root / f"{kind}.safetensors" for kind in KINDS}


@pytest.fixture(autouse=True)
def known(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tiny]:
    """The tiny networks are what this version knows."""
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path / "home"))
    found = {folder.name: tiny(folder, kind == "xl") for kind, folder in checkpoints.items()}
    monkeypatch.setattr(sources, "architectures", lambda: found)
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(
    kind: str, suffix: str, checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    path = files[kind]
    if suffix == ".ckpt":
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": load_file(files[kind]), "global_step": 3}, path)
    checkpoint = model_source(path, allow_pickle=suffix == ".ckpt").open()
    assert checkpoint.model_index["_class_name"].startswith("StableDiffusion") and checkpoint.sdxl == (kind == "xl")
    for part in checkpoint.parts:
        stem = STEMS.get(part, "diffusion_pytorch_model")
        wanted = {
            published_name(part, n): t for n, t in load_file(checkpoints[kind] / part / f"{stem}.safetensors").items()
        }
        assert checkpoint.weight_shapes(part) == {name: tuple(t.shape) for name, t in wanted.items()}
        loaded = {published_name(part, n): t for n, t in load_module(checkpoint, part).state_dict().items()}
        assert loaded.keys() == wanted.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor.float(), wanted[name].float()), f"{part}: {name}"


def test_the_files_precision_is_kept_until_it_is_asked_for(files: dict[str, Path], known: dict[str, Tiny]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(files["xl"]).items()}
    loader = SingleFile(files["xl"], known["tiny-xl"], shapes)
    assert {p.dtype for p in loader.load("unet").parameters()} == {torch.float16}


def test_a_single_file_has_a_tokenizer_and_a_scheduler(files: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = model_source(files["xl"]).open()
    assert checkpoint.path.parent == tmp_path / "home" / "architectures"
    assert checkpoint.scheduler["timestep_spacing"] == "leading"
    from transformers import CLIPTokenizerFast

    for name, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = CLIPTokenizerFast.from_pretrained(checkpoint.path / name)
        # OpenAI's own numbers for these words, as its notebook and every SD repository have them
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert (tokenizer.pad_token_id, len(tokenizer)) == (pad, 49408)
    before = sorted(p.stat().st_mtime_ns for p in checkpoint.path.rglob("*"))
    again = model_source(files["xl"]).open()
    assert again.path == checkpoint.path and sorted(p.stat().st_mtime_ns for p in again.path.rglob("*")) == before


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(VegaEdgeError) as caught:
        model_source(path, **options).open()
    return str(caught.value)


def changed(source: Path, target: Path, change: Any) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target)
    return target


def test_incomplete_files(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"

    def without(prefix: str) -> Any:
        return lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(prefix)]

    assert refusal(changed(files["sd"], target, without("first_stage_model."))) == (
        f"{target} holds no vae (no first_stage_model.*); use a complete checkpoint"
    )
    assert refusal(changed(files["xl"], target, without("conditioner.embedders.0."))) == (
        f"{target} holds no text_encoder (no cond_stage_model.transformer.* or conditioner.embedders.0.transformer.*); "
        "use a complete checkpoint"
    )
    assert refusal(changed(files["sd"], target, without("model.diffusion_model.out.2.bias"))) == (
        f"{target}: 1 weights of unet are not tiny-sd's, the first is conv_out.bias (missing here, 4 there); "
        "use a checkpoint of a known architecture"
    )

    def wider(tensors: dict[str, Any]) -> None:
        tensors["first_stage_model.quant_conv.weight"] = torch.zeros(8, 9, 1, 1)

    assert refusal(changed(files["sd"], target, wider)) == (
        f"{target}: 1 weights of vae are not tiny-sd's, the first is quant_conv.weight (8x9x1x1 here, 8x8x1x1 there); "
        "use a checkpoint of a known architecture"
    )
    target.write_bytes(files["sd"].read_bytes()[:-9])
    assert refusal(target).startswith(f"{target} has ") and refusal(target).endswith("; fetch it again")


def test_a_recipe_asks_for_its_own_architecture(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_source("dynavis-lightning", start=str(files["xl"])).open()
    assert str(caught.value) == (
        f"{files['xl']} is of the architecture tiny-xl, and dynavis-lightning of sdxl; leave the model's name out, "
        "or choose another file"
    )


def test_a_recipes_scheduler_comes_along(files: dict[str, Path]) -> None:
    """A single file has no scheduler; SDXL-Lightning's is trailing, which SDXL's is not."""
    source = model_source("dynavis-lightning", start=str(files["xl"]))
    recipe = dataclasses.replace(source.recipe, architecture="tiny-xl")
    assert dataclasses.replace(source, recipe=recipe).open().scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"double_blocks.0.img_attn.proj.weight": (8, 8)}, "a Flux or Hunyuan model"),
        ({"model.diffusion_model.joint_blocks.0.x": (8,)}, "a Stable Diffusion 3 model"),
        ({"lora_unet_x.lora_down.weight": (8, 8)}, "a LoRA; give it with --lora, beside its base model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "one part in diffusers' names; give the whole"),
        ({"encoder.conv_in.weight": (8,), "decoder.conv_in.weight": (8,)}, "an autoencoder alone"),
        ({"blk.0.weight": (8,)}, "of an unknown kind"),
    ],
)
def test_other_files_are_named(names: Mapping[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"x.safetensors is no checkpoint of a known architecture but {what}"
    ) as e:
        detect(Path("x.safetensors"), names, architectures())
    assert str(e.value).endswith("known are: segmind-vega, ssd-1b, sdxl, sd15, small-sd, tiny-sd")


REAL = architectures()
BLOCK = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"


def real_shapes(architecture: Architecture, **config: Any) -> dict[str, tuple[int, ...]]:
    """The whole file of a real checkpoint, as names and shapes."""
    shapes = {}
    module = new_module("unet", {**architecture.config("unet"), **config})
    split = {name: (name.rpartition("."), tuple(p.shape)) for name, p in module.named_parameters()}
    names = ldm_names({owner for (owner, _, _), _ in split.values()})
    for (owner, _, kind), shape in split.values():
        shapes[f"model.diffusion_model.{names[owner]}.{kind}"] = shape
    return shapes


@pytest.mark.parametrize("name", REAL)
def test_real_architectures_are_told_apart(name: str) -> None:
    shapes = real_shapes(REAL[name])
    assert detect(Path("x"), shapes, REAL).name == name
    unet = {n.removeprefix("model.diffusion_model."): s for n, s in shapes.items()}
    assert shape_of(unet) == shape_of_config(REAL[name].config("unet"))
    loader = SingleFile(Path("x"), REAL[name], shapes)
    module = new_module("unet", REAL[name].config("unet"))
    assert loader.shapes("unet") == {n: tuple(p.shape) for n, p in module.named_parameters()}


def test_relatives_of_known_architectures_are_refused() -> None:
    names = "segmind-vega, ssd-1b, sdxl, sd15, small-sd, tiny-sd"
    cases = {
        "its architecture is Stable Diffusion 2; ": {"cross_attention_dim": 1024},
        "its architecture is SDXL's refiner; ": {"cross_attention_dim": 1280},
    }
    for text, config in cases.items():
        with pytest.raises(CheckpointError) as caught:
            detect(Path("x"), real_shapes(REAL["sd15"], **config), REAL)
        assert str(caught.value) == f"x: {text}known are: {names}"
    with pytest.raises(CheckpointError, match=r"x takes 9 channels \(inpainting or editing\)"):
        detect(Path("x"), real_shapes(REAL["sd15"], in_channels=9), REAL)
    with pytest.raises(CheckpointError, match=r"x: its architecture is unknown, its text has 768 channels and its blo"):
        detect(Path("x"), real_shapes(REAL["sd15"], layers_per_block=3), REAL)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("edm_mean", "EDM"),
        ("edm_std", "EDM"),
        ("edm_vpred.sigma_max", "EDM model that predicts velocity"),
        ("edm_vpred.sigma_min", "EDM model that predicts velocity"),
        ("v_pred", "predicts velocity"),
        ("ztsnr", "signal-to-noise ratio of zero"),
    ],
)
def test_marks_of_other_predictions(files: dict[str, Path], tmp_path: Path, mark: str, what: str, suffix: str) -> None:
    """As ComfyUI writes and reads them: tensors, some of them empty."""
    tensors = {**load_file(files["xl"]), mark: torch.zeros(0 if mark in ("v_pred", "ztsnr") else 4)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    text = refusal(path, allow_pickle=True)
    assert what in text and f"({mark})" in text and "\n" not in text
    assert ("prediction_type" in text) == (not mark.startswith("edm"))  # the way that there is


@pytest.mark.parametrize(
    ("metadata", "refused"),
    [
        ({"modelspec.prediction_type": "v"}, True),
        ({"modelspec.prediction_type": "velocity"}, True),
        ({"modelspec.predict_key": "v"}, True),
        ({"prediction_type": "v"}, True),
        ({"prediction_type": "v_prediction"}, True),
        ({"ss_v_parameterization": "True"}, True),
        ({"ss_zero_terminal_snr": "True"}, True),
        ({"modelspec.prediction_type": "epsilon", "modelspec.predict_key": "epsilon", "prediction_type": "eps"}, False),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False", "prediction_type": ""}, False),
    ],
)
def test_metadata_of_other_predictions(
    files: dict[str, Path], tmp_path: Path, metadata: dict[str, str], refused: bool
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(files["sd"]), path, metadata=metadata)
    if not refused:
        assert not model_source(path).open().sdxl
        return
    assert next(iter(metadata)) in refusal(path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
def test_weights_in_eight_bits(files: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    tensors = load_file(files["sd"])
    name = next(n for n in tensors if n.startswith("model.diffusion_model.") and n.endswith(".weight"))
    path = tmp_path / "model.safetensors"
    save_file({**tensors, name: tensors[name].to(getattr(torch, dtype))}, path)
    kind = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[dtype]
    assert f"{name} is stored as {kind}" in refusal(path)
    counters = {"model_ema.num_updates": torch.zeros(1, dtype=torch.int32)}  # training's own are not looked at
    counters["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file({**tensors, **counters}, path)
    assert not model_source(path).open().sdxl


def test_pickles_are_asked_for(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(files["sd"])}, path)
    assert refusal(path) == (
        f"{path} is pickled, which can run any code when it is read; if you trust it, --allow-pickle reads it with "
        "torch's weights_only"
    )
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF")
    assert refusal(other) == (
        f"{other} is no checkpoint that is known; allowed are .safetensors and .bin, .ckpt, .pt, .pth"
    )
    with pytest.raises(ExportError, match="does not exist; give a model's name, a diffusers folder"):
        model_source(tmp_path / "nowhere").open()
