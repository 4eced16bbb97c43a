"""What export refuses before it starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from vega_edge.errors import CheckpointError, ExportError, UsageError  # noqa: E402
from vega_edge.export import export_bundle  # noqa: E402
from vega_edge.export.checkpoint import load_module, open_checkpoint, published_name  # noqa: E402
from vega_edge.export.parts import load_packed  # noqa: E402
from vega_edge.models import architectures  # noqa: E402

from .checkpoints import WEIGHTS, edit, write_json  # noqa: E402


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "bundle"


def refusal(source: Path, out: Path, **options: Any) -> str:
    """The text of the error; that nothing was written is checked too."""
    with pytest.raises((CheckpointError, ExportError, UsageError)) as caught:
        export_bundle(source, out, **options)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


def test_refuses_pickled_weights(broken: Path, out: Path) -> None:
    folder = broken / "unet"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert refusal(broken, out) == (
        f"{folder} holds only pickled weights (diffusion_pytorch_model.bin), which can run any code when they are "
        "read; if you trust them, --allow-pickle reads them with torch's weights_only, or convert them with "
        "from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
    )


def test_refuses_what_is_no_checkpoint(checkpoint: Path, broken: Path, out: Path) -> None:
    assert refusal(broken / "nowhere", out) == (
        f"{broken / 'nowhere'} does not exist; give a model's name, a diffusers folder, a .safetensors checkpoint, or "
        "hf:OWNER/NAME for a repository of the hub"
    )
    single = broken / "unet" / WEIGHTS
    assert refusal(single, out) == (
        f"{single} is no checkpoint of a known architecture but one part in diffusers' names; give the whole diffusers "
        f"folder; known are: {', '.join(architectures())}"
    )
    edit(broken / "model_index.json", _class_name="FluxPipeline")
    kinds = "StableDiffusionPipeline and StableDiffusionXLPipeline"
    assert refusal(broken, out) == f"{broken} is a FluxPipeline; exported are {kinds}"
    (broken / "model_index.json").write_text("{", encoding="utf-8")
    assert refusal(broken, out).startswith(f"{broken / 'model_index.json'} is not valid JSON (")
    (broken / "model_index.json").unlink()
    assert refusal(broken, out) == (
        f"{broken / 'model_index.json'} is missing; "
        "export needs a whole diffusers folder (as save_pretrained writes it)"
    )


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "unet",
            {"time_cond_proj_dim": 256},
            "unet: time_cond_proj_dim is 256 (it takes its guidance as an input); text-to-image models with null are exported",
        ),
        (
            "unet",
            {"in_channels": 9},
            "unet: in_channels is 9 (inpainting and editing models have more); text-to-image models with 4 are exported",
        ),
        (
            "unet",
            {"addition_embed_type": "image"},
            "unet: addition_embed_type is 'image'; text-to-image models with null or 'text_time' are exported",
        ),
        ("vae", {"_class_name": "VQModel"}, "vae is a VQModel; exported is AutoencoderKL"),
        (
            "text_encoder",
            {"architectures": ["T5EncoderModel"]},
            "text_encoder is a T5EncoderModel; exported is CLIPTextModel",
        ),
        (
            "text_encoder",
            {"architectures": 5},
            "text_encoder: architectures is 5, not a list; exported is ['CLIPTextModel']",
        ),
        (
            "text_encoder",
            {"architectures": "CLIPTextModel"},
            "text_encoder: architectures is 'CLIPTextModel', not a list; exported is ['CLIPTextModel']",
        ),
        (
            "vae",
            {"block_out_channels": None},
            "vae: block_out_channels is None; it must be a list of whole numbers; fetch its config.json again",
        ),
        (
            "unet",
            {"block_out_channels": [16, "32"]},
            "unet: block_out_channels is [16, '32']; it must be a list of whole numbers; fetch its config.json again",
        ),
    ],
)
def test_refuses_other_architectures(broken: Path, out: Path, part: str, change: dict[str, Any], message: str) -> None:
    edit(broken / part / "config.json", **change)
    assert refusal(broken, out) == message


def test_refuses_a_model_index_that_names_a_list(broken: Path, out: Path) -> None:
    edit(broken / "model_index.json", _class_name=["x"])
    kinds = "StableDiffusionPipeline and StableDiffusionXLPipeline"
    assert refusal(broken, out) == f"{broken} is a ['x']; exported are {kinds}"


def test_refuses_weights_that_are_not_the_configurations(broken: Path, out: Path) -> None:
    """Before anything is exported: a U-Net is the last part."""
    edit(broken / "unet" / "config.json", conv_in_kernel=1)
    wanted = (
        f"{broken / 'unet'}: 1 weights are not as config.json says, the first is conv_in.weight (16x4x3x3 here, 16x4x1x1 "
        "there); fetch both again"
    )
    assert refusal(broken, out) == wanted


def test_refuses_a_configuration_that_describes_no_network(broken: Path, out: Path) -> None:
    edit(broken / "text_encoder" / "config.json", intermediate_size="wide")
    got = refusal(broken, out)
    assert got.startswith("text_encoder: its config.json describes no CLIPTextModel (")
    assert got.endswith("); fetch it again") and "intermediate_size" in got and "\n" not in got


def test_says_which_weights_are_left_out(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(broken / "unet" / WEIGHTS)
    save_file({**tensors, "gone.weight": tensors["conv_in.bias"].clone()}, broken / "unet" / WEIGHTS)
    open_checkpoint(broken)
    assert [record.message for record in caplog.records] == [
        f"{broken / 'unet'}: 1 weights are of no layer that config.json has, the first is gone.weight; they are left out"
    ]


def test_an_autoencoder_with_the_names_of_2022(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Stable Diffusion 1.5's is published; diffusers renames them when it loads them."""
    wanted = load_file(broken / "vae" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = dict(wanted)
    for name in wanted:
        for new, before in old.items():
            if f".{new}." in name:
                tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)
    assert tensors.keys() != wanted.keys()
    save_file(tensors, broken / "vae" / WEIGHTS, metadata={"format": "pt"})
    loaded = load_module(open_checkpoint(broken), "vae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items()) and not caplog.records


@pytest.mark.parametrize("missing", [None, "merges.txt"])
def test_refuses_a_missing_tokenizer_before_anything_is_exported(
    broken: Path, out: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    monkeypatch.setattr("vega_edge.export.writer._export_parts", lambda *_: pytest.fail("exported"))
    folder = broken / "tokenizer"
    if missing:
        (folder / missing).unlink()
        assert refusal(broken, out) == (
            f"{folder / missing} is missing, and there is no tokenizer.json; fetch it again"
        )
        return
    shutil.rmtree(folder)
    assert refusal(broken, out) == (
        f"{folder} is missing; export needs a whole diffusers folder (as save_pretrained writes it)"
    )


def test_refuses_damaged_weights(broken: Path, out: Path) -> None:
    path = broken / "unet" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError) as caught:
        load_module(open_checkpoint(broken), "unet")
    assert str(caught.value) == f"{path} has {len(whole) - 10} bytes, its header says {len(whole)}; fetch it again"
    path.unlink()
    assert refusal(broken, out) == (
        f"{broken / 'unet'} holds no weights; expected {WEIGHTS} or diffusion_pytorch_model.fp16.safetensors"
    )


@pytest.mark.parametrize(("part", "file"), [("unet", WEIGHTS), ("text_encoder", "model.safetensors")])
def test_refuses_missing_weights(broken: Path, part: str, file: str) -> None:
    """The libraries would fill them with random numbers and a warning."""
    tensors = load_file(broken / part / file)
    name = min(n for n in tensors if n.endswith("bias"))
    shape = "x".join(map(str, tensors[name].shape))
    del tensors[name]
    save_file(tensors, broken / part / file, metadata={"format": "pt"})
    with pytest.raises(ExportError) as caught:
        open_checkpoint(broken)
    assert str(caught.value) == (
        f"{broken / part}: 1 weights are not as config.json says, the first is {published_name(part, name)} "
        f"(missing here, {shape} there); fetch both again"
    )


def test_refuses_a_lora_for_a_weight_that_the_model_lacks(checkpoint: Path) -> None:
    """The files name it, the class that loads them does not: without this its layers would be left out in silence."""
    with pytest.raises(ExportError) as caught:
        load_packed(open_checkpoint(checkpoint), "text_encoder", "fp16", {"gone.weight": [], "other.weight": []})
    assert str(caught.value) == (
        "text_encoder: its files name gone.weight, the loaded model has no such weight; the LoRA can't be fused"
    )


def test_refuses_a_tiny_autoencoder_of_other_latents(broken: Path, out: Path) -> None:
    edit(broken / "tiny" / "config.json", latent_channels=16)
    assert refusal(broken, out, tiny_vae=broken / "tiny") == (
        "tiny_vae decodes 16 channels over 2 levels, the checkpoint's latents have 4 over 2; "
        "use a tiny autoencoder made for these latents"
    )
    edit(broken / "tiny" / "config.json", latent_channels=4, decoder_block_out_channels=[8, 8, 8])
    assert refusal(broken, out, tiny_vae=broken / "tiny").startswith("tiny_vae decodes 4 channels over 3 levels")


def test_refuses_arguments(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    assert refusal(checkpoint, out, dtype="fp8") == "unknown dtype 'fp8'; there are: bf16, fp16, fp32, int8"
    assert (
        refusal(checkpoint, out, weights="int4")
        == "unknown weights 'int4'; did you mean 'int8'? there are: bf16, fp16, fp32, int8"
    )
    assert refusal(checkpoint, out, dtype="fp16", weights="fp32") == (
        "weights fp32 with dtype fp16 is not a pair that is exported; with dtype fp16 weights can be fp16 or int8"
    )
    assert refusal(checkpoint, out, vae="half") == "unknown vae 'half'; there are: full, tiny"
    assert refusal(checkpoint, out, vae="tiny") == (
        "vae tiny needs a tiny autoencoder; say its folder: --tiny-vae FOLDER"
    )
    lora = tmp_path / "lora.safetensors"
    assert refusal(checkpoint, out, loras=[(lora, float("nan"))]) == (
        f"LoRA {lora}: its strength is nan; it must be a finite number, 1 is as trained"
    )
    assert (
        refusal(checkpoint, out, loras=[(lora, 1)])
        == f"LoRA {lora} is not a file; give the path of its .safetensors file"
    )
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "no" / "bundle")
    assert (
        str(caught.value)
        == f"{tmp_path / 'no' / 'bundle'} can't be made: {tmp_path / 'no'} does not exist; create that folder first"
    )
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "exports")
    assert str(caught.value) == f"{tmp_path / 'exports'} exists already; choose another folder, or pass --overwrite"


def test_fp16_variant_and_shards_are_found(broken: Path) -> None:
    """Published folders often have only `.fp16.safetensors`; large ones are split."""
    folder = broken / "unet"
    wanted = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_loads(broken, wanted)
    names = sorted(wanted)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, keys in shards.items():
        save_file({k: wanted[k] for k in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: file for file, keys in shards.items() for k in keys}}
    write_json(folder / f"{WEIGHTS}.index.json", index)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert_loads(broken, wanted)


def assert_loads(source: Path, wanted: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(source)
    assert checkpoint.weight_shapes("unet") == {name: tuple(t.shape) for name, t in wanted.items()}
    for name, parameter in load_module(checkpoint, "unet").named_parameters():
        assert parameter.dtype == torch.float16
        np.testing.assert_array_equal(parameter.numpy(), wanted[name].numpy())


def test_importing_needs_no_torch() -> None:
    heavy = ("torch", "onnx", "diffusers", "transformers")
    code = f"import sys, vega_edge.export, vega_edge.lora; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
