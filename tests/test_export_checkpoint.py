"""What export refuses before it starts; and the tiny random checkpoints that all export tests use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

from vega_edge.errors import CheckpointError, ExportError, UsageError  # noqa: E402
from vega_edge.export import export_bundle  # noqa: E402
from vega_edge.export.checkpoint import load_module, open_checkpoint  # noqa: E402
from vega_edge.models import architectures  # noqa: E402

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("r e", "re d</w>", "c a", "ca t</w>")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path, pad: str) -> int:
    """CLIP's layout: 256 bytes, the same at a word's end, merges, start, end. Returns the size of the vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    merged = (m.replace(" ", "") for m in MERGES)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merged, START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special},
    )
    return len(tokens)


def _text_encoder(kind: type, vocabulary: int, width: int, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=width,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return kind(config)


def _unet(sdxl: bool) -> Any:
    if sdxl:  # as Segmind-Vega: one level without attention, a middle block without attention, size conditioning
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=40,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1],
            attention_head_dim=[1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            use_linear_projection=True,
        )
    return UNet2DConditionModel(  # as Tiny-SD: no middle block, 1x1 convolutions about the attention
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
    )


def make_checkpoint(folder: Path, sdxl: bool) -> Path:
    """A whole diffusers folder in fp16, with a TAESD-like autoencoder in `tiny/`, of random weights."""
    torch.manual_seed(0)
    index = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    modules = {"unet": _unet(sdxl)}
    size = write_tokenizer(folder / "tokenizer", END)
    modules["text_encoder"] = _text_encoder(CLIPTextModel, size, 16, "quick_gelu")
    if sdxl:
        write_tokenizer(folder / "tokenizer_2", "!")
        modules["text_encoder_2"] = _text_encoder(CLIPTextModelWithProjection, size, 24, "gelu")
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    modules["vae"] = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        force_upcast=True,
    )
    modules["tiny"] = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for name, module in modules.items():
        for parameter in module.parameters():  # zero biases and norms of one would hide that they are mixed up
            parameter.data += 0.05 * torch.randn(parameter.shape)
        module.half().save_pretrained(folder / name)
    edit(folder / "tiny" / "config.json", scaling_factor=...)  # as published files before diffusers 0.10
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    kind = "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    write_json(folder / "model_index.json", {"_class_name": kind, "force_zeros_for_empty_prompt": True, **index})
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-sd", sdxl=False)


@pytest.fixture
def broken(sd: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd, tmp_path / "checkpoint"))


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


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... removes one."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in values.items() if value is not ...})


def test_refuses_pickled_weights(broken: Path, out: Path) -> None:
    folder = broken / "unet"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert refusal(broken, out) == (
        f"{folder} holds only pickled weights (diffusion_pytorch_model.bin), which can run any code when they are "
        "read; if you trust them, --allow-pickle reads them with torch's weights_only, or convert them with "
        "from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
    )


def test_refuses_what_is_no_checkpoint(sd: Path, broken: Path, out: Path) -> None:
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
            "unet: time_cond_proj_dim is 256; text-to-image models with null are exported",
        ),
        ("unet", {"in_channels": 9}, "unet: in_channels is 9; text-to-image models with 4 are exported"),
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
    ],
)
def test_refuses_other_architectures(broken: Path, out: Path, part: str, change: dict[str, Any], message: str) -> None:
    edit(broken / part / "config.json", **change)
    assert refusal(broken, out) == message


def test_refuses_damaged_weights(broken: Path, out: Path) -> None:
    path = broken / "unet" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError) as caught:
        load_module(open_checkpoint(broken), "unet", {})
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
    del tensors[name]
    save_file(tensors, broken / part / file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"1 weights are missing, the first is {name}; fetch it again"):
        load_module(open_checkpoint(broken), part, {})


def test_refuses_a_tiny_autoencoder_of_other_latents(broken: Path, out: Path) -> None:
    edit(broken / "tiny" / "config.json", latent_channels=16)
    assert refusal(broken, out, tiny_vae=broken / "tiny") == (
        "tiny_vae decodes 16 channels over 2 levels, the checkpoint's latents have 4 over 2; "
        "use a tiny autoencoder made for these latents"
    )
    edit(broken / "tiny" / "config.json", latent_channels=4, decoder_block_out_channels=[8, 8, 8])
    assert refusal(broken, out, tiny_vae=broken / "tiny").startswith("tiny_vae decodes 4 channels over 3 levels")


def test_refuses_arguments(sd: Path, out: Path, tmp_path: Path) -> None:
    assert refusal(sd, out, dtype="fp8") == "unknown dtype 'fp8'; there are: bf16, fp16, fp32, int8"
    assert (
        refusal(sd, out, weights="int4")
        == "unknown weights 'int4'; did you mean 'int8'? there are: bf16, fp16, fp32, int8"
    )
    assert refusal(sd, out, dtype="fp16", weights="fp32") == (
        "weights fp32 with dtype fp16 is not a pair that is exported; with dtype fp16 weights can be fp16 or int8"
    )
    assert refusal(sd, out, vae="half") == "unknown vae 'half'; there are: full, tiny"
    assert refusal(sd, out, vae="tiny") == ("vae tiny needs a tiny autoencoder; say its folder: --tiny-vae FOLDER")
    lora = tmp_path / "lora.safetensors"
    assert refusal(sd, out, loras=[(lora, float("nan"))]) == (
        f"LoRA {lora}: its strength is nan; it must be a finite number, 1 is as trained"
    )
    assert refusal(sd, out, loras=[(lora, 1)]) == f"LoRA {lora} is not a file; give the path of its .safetensors file"
    with pytest.raises(ExportError) as caught:
        export_bundle(sd, tmp_path / "no" / "bundle")
    assert (
        str(caught.value)
        == f"{tmp_path / 'no' / 'bundle'} can't be made: {tmp_path / 'no'} does not exist; create that folder first"
    )
    with pytest.raises(ExportError) as caught:
        export_bundle(sd, tmp_path / "exports")
    assert str(caught.value) == f"{tmp_path / 'exports'} exists already; choose another folder, or ask to overwrite it"


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
    for name, parameter in load_module(checkpoint, "unet", {}).named_parameters():
        assert parameter.dtype == torch.float16
        np.testing.assert_array_equal(parameter.numpy(), wanted[name].numpy())


def test_importing_needs_no_torch() -> None:
    heavy = ("torch", "onnx", "diffusers", "transformers")
    code = f"import sys, vega_edge.export, vega_edge.lora; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
