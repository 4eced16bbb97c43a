"""LoRA files: every spelling gives the same change, alpha counts, nothing that fits nowhere is dropped in silence."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vega_edge.cli import main
from vega_edge.errors import CheckpointError
from vega_edge.lora import match_lora, read_lora
from vega_edge.safetensors_file import read_float32
from vega_edge.verbs.common import lora as lora_argument

TO_OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.1.resnets.0.conv1"
PROJ = "down_blocks.1.attentions.0.proj_in"
QUERY = "text_model.encoder.layers.0.self_attn.q_proj"
WEIGHTS = {
    "unet": {
        f"{TO_OUT}.weight": (6, 5),
        f"{CONV}.weight": (4, 3, 3, 3),
        f"{PROJ}.weight": (6, 5, 1, 1),
        f"{CONV}.bias": (4,),
    },
    "text_encoder": {f"{QUERY}.weight": (8, 8)},
    "text_encoder_2": {f"{QUERY}.weight": (8, 8)},
}
RANK = 2
Tensors = dict[str, NDArray[Any]]


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, dtype: str = "F32") -> Path:
    """Written by hand, so that the reader is checked against the format and not against another reader."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in tensors.items():
        raw = array.astype("<f4").tobytes()
        if dtype == "BF16":
            raw = (np.frombuffer(raw, "<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def matrices(out: int, inside: int, kernel: tuple[int, ...] = ()) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(out + inside + len(kernel))
    down = random.integers(-8, 8, (RANK, inside, *kernel)) / 8  # exact in bfloat16 too
    return down, random.integers(-8, 8, (out, RANK, *(1 for _ in kernel))) / 8


def change(down: NDArray[Any], up: NDArray[Any], scale: float) -> NDArray[Any]:
    """W' - W by the definition: the second layer after the first."""
    return scale * np.einsum("or,ri...->oi...", up.reshape(len(up), RANK), down)


DOWN, UP = matrices(6, 5)


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        (
            f"lora_unet_{TO_OUT.replace('.', '_')}.lora_down.weight",
            f"lora_unet_{TO_OUT.replace('.', '_')}.lora_up.weight",
            f"lora_unet_{TO_OUT.replace('.', '_')}.alpha",
        ),
        (f"unet.{TO_OUT}.lora_A.weight", f"unet.{TO_OUT}.lora_B.weight", f"unet.{TO_OUT}.alpha"),
        (f"unet.{TO_OUT}.lora_A.default.weight", f"unet.{TO_OUT}.lora_B.default.weight", f"unet.{TO_OUT}.alpha"),
        (f"unet.{TO_OUT}.lora.down.weight", f"unet.{TO_OUT}.lora.up.weight", f"unet.{TO_OUT}.alpha"),
        (
            f"unet.{TO_OUT}.lora_linear_layer.down.weight",
            f"unet.{TO_OUT}.lora_linear_layer.up.weight",
            f"unet.{TO_OUT}.alpha",
        ),
        (f"{TO_OUT}.lora_A.weight", f"{TO_OUT}.lora_B.weight", f"{TO_OUT}.alpha"),
        (
            f"unet.{TO_OUT[:-9]}.processor.to_out_lora.down.weight",
            f"unet.{TO_OUT[:-9]}.processor.to_out_lora.up.weight",
            None,
        ),
    ],
    ids=["kohya", "peft", "peft-adapter", "diffusers", "diffusers-linear", "bare", "diffusers-processor"],
)
def test_every_spelling_is_the_same_change(tmp_path: Path, down: str, up: str, alpha: str | None) -> None:
    tensors = {down: DOWN, up: UP, **({alpha: np.array(8.0)} if alpha else {})}
    matched = match_lora(read_lora(write_safetensors(tmp_path / "l.safetensors", tensors)), WEIGHTS)
    assert matched.keys() == {"unet"} and matched["unet"].keys() == {f"{TO_OUT}.weight"}
    got = matched["unet"][f"{TO_OUT}.weight"].delta((6, 5), strength=0.5)
    scale = 8 / RANK if alpha else 1.0
    np.testing.assert_allclose(got, change(DOWN, UP, 0.5 * scale), rtol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "part"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder_2"),
        (f"text_encoder.{QUERY}", "text_encoder"),
        (f"text_encoder_2.{QUERY}", "text_encoder_2"),
        ("text_encoder_2.encoder.layers.0.self_attn.q_proj", "text_encoder_2"),
    ],
)
def test_text_encoders_are_told_apart(tmp_path: Path, prefix: str, part: str) -> None:
    down, up = matrices(8, 8)
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
    matched = match_lora(read_lora(write_safetensors(tmp_path / "l.safetensors", tensors)), WEIGHTS)
    assert {p: set(names) for p, names in matched.items()} == {part: {f"{QUERY}.weight"}}


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (6, 5, 1, 1)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_convolutions(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    name = CONV if shape[2] == 3 else PROJ
    down, up = matrices(shape[0], shape[1], shape[2:])
    tensors = {
        f"unet.{name}.lora_A.weight": down,
        f"unet.{name}.lora_B.weight": up,
        f"unet.{name}.alpha": np.array(0.5),
    }
    matched = match_lora(read_lora(write_safetensors(tmp_path / "l.safetensors", tensors, dtype=dtype)), WEIGHTS)
    got = matched["unet"][f"{name}.weight"].delta(shape, 1.0)
    assert got.dtype == np.float32 and got.shape == shape
    np.testing.assert_allclose(got, change(down, up, 0.25), rtol=1e-6)


def test_a_linear_lora_fits_a_1x1_convolution(tmp_path: Path) -> None:
    tensors = {f"unet.{PROJ}.lora_A.weight": DOWN, f"unet.{PROJ}.lora_B.weight": UP}
    matched = match_lora(read_lora(write_safetensors(tmp_path / "l.safetensors", tensors)), WEIGHTS)
    np.testing.assert_allclose(
        matched["unet"][f"{PROJ}.weight"].delta((6, 5, 1, 1), 1.0)[:, :, 0, 0], change(DOWN, UP, 1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8, "r": RANK}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_out.0": 3}}, 1.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_out.0": 3}}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
    ],
)
def test_alpha_of_peft(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    """In the file's metadata, as diffusers saves it, or in adapter_config.json, as PEFT does."""
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    names = (f"{TO_OUT}.lora_A.weight", f"{TO_OUT}.lora_B.weight")
    saved = write_safetensors(
        tmp_path / "a.safetensors", dict(zip([f"unet.{n}" for n in names], [DOWN, UP], strict=True)), metadata
    )
    raw = write_safetensors(
        tmp_path / "b.safetensors", dict(zip([f"base_model.model.{n}" for n in names], [DOWN, UP], strict=True))
    )
    with pytest.raises(CheckpointError, match=r"its alpha is in adapter_config\.json; put that beside it"):
        read_lora(raw)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (saved, raw):
        (layer,) = read_lora(path).layers.values()
        np.testing.assert_allclose(layer.delta((6, 5), 1.0), change(DOWN, UP, scale), rtol=1e-6)


def test_what_fits_nothing_is_counted_and_named(tmp_path: Path) -> None:
    other = {f"lora_unet_mid_block_{n}.lora_{w}.weight": m for n in "vwxyz" for w, m in (("down", DOWN), ("up", UP))}
    fitting = {f"unet.{TO_OUT}.lora_A.weight": DOWN, f"unet.{TO_OUT}.lora_B.weight": UP}
    path = write_safetensors(tmp_path / "l.safetensors", {**fitting, **other})
    with pytest.raises(CheckpointError) as caught:
        match_lora(read_lora(path), WEIGHTS)
    assert str(caught.value) == (
        f"LoRA {path}: 5 of its 6 modules fit nothing in this checkpoint, the first is lora_unet_mid_block_v (6x5, no "
        "such module), then lora_unet_mid_block_w (6x5, no such module), then lora_unet_mid_block_x (6x5, no such "
        "module) and 2 more; 1 fit; use a LoRA made for this architecture"
    )
    wider = {**WEIGHTS, "unet": {f"{TO_OUT}.weight": (6, 7)}}
    with pytest.raises(CheckpointError) as caught:
        match_lora(read_lora(write_safetensors(path, fitting)), wider)
    assert str(caught.value) == (
        f"LoRA {path}: 1 of its 1 modules fit nothing in this checkpoint, the first is unet.{TO_OUT} "
        "(6x5 here, 6x7 in the checkpoint); 0 fit; use a LoRA made for this architecture"
    )


def test_another_architecture_is_named(tmp_path: Path) -> None:
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = np.zeros((RANK, 2048)), np.zeros((320, RANK))
    tensors = {f"unet.{key}.lora_A.weight": down, f"unet.{key}.lora_B.weight": up}
    path = write_safetensors(tmp_path / "l.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        match_lora(read_lora(path), {"unet": {f"{key}.weight": (320, 768)}})
    assert str(caught.value) == (
        f"LoRA {path}: 1 of its 1 modules fit nothing in this checkpoint, the first is unet.{key} (320x2048 here, "
        "320x768 in the checkpoint); 0 fit; it is for SDXL, this is SD 1.x; use a LoRA made for this architecture"
    )


# As in Segmind-Vega: two layers a level, no attention on the first, a middle block of one resnet; 1x1 and 3x3 kernels.
ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "output_blocks_0_1_proj_in": "up_blocks.0.attentions.0.proj_in",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_in_layers_2": "up_blocks.1.resnets.2.conv1",
    "out_2": "conv_out",
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model_"])
def test_modules_in_the_original_layouts_names(tmp_path: Path, prefix: str) -> None:
    shape = (6, 5)
    weights = {"unet": {f"{name}.weight": shape for name in ORIGINAL.values()}, "text_encoder": {}}
    tensors = {}
    for old in ORIGINAL:
        key = f"lora_unet_{old}" if prefix == "lora_unet_" else f"diffusion_model.{old.replace('_', '.')}"
        tensors |= {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP}
    lora = read_lora(write_safetensors(tmp_path / "l.safetensors", tensors))
    matched = match_lora(lora, weights)["unet"]
    got = {name: layer.label.removeprefix("lora_unet_") for name, layer in matched.items()}
    if prefix == "lora_unet_":
        assert got == {f"{name}.weight": old for old, name in ORIGINAL.items()}
    assert len(got) == len(ORIGINAL)


def test_a_module_in_the_original_and_in_diffusers_names_is_refused(tmp_path: Path) -> None:
    tensors = {}
    for key in ("lora_unet_out_2", "lora_unet_conv_out"):
        tensors |= {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP}
    lora = read_lora(write_safetensors(tmp_path / "l.safetensors", tensors))
    with pytest.raises(
        CheckpointError, match="lora_unet_conv_out and lora_unet_out_2 are the same module, spelled twi"
    ):
        match_lora(lora, {"unet": {"conv_out.weight": (6, 5)}})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("in:side/a.safetensors:-1", ("in:side/a.safetensors", -1.0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:.5", (r"C:\loras\a.safetensors", 0.5)),
        ("my:style.safetensors", ("my:style.safetensors", 1.0)),
    ],
)
def test_a_lora_and_its_strength(text: str, wanted: tuple[str, float]) -> None:
    file, strength = lora_argument(text)
    assert (str(file), strength) == wanted


@pytest.mark.parametrize("text", ["a.safetensors:half", "a.safetensors:", "a.safetensors:nan", "a.safetensors:inf"])
def test_a_strength_is_a_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        lora_argument(text)
    assert str(caught.value) == f"must be FILE or FILE:STRENGTH, such as style.safetensors:0.8, got {text!r}"


@pytest.mark.parametrize(
    "strange", [f"unet.{TO_OUT}.lora_magnitude_vector", f"lora_unet_{TO_OUT}.hada_w1_a", f"unet.{TO_OUT}.weight"]
)
def test_other_adapters_are_refused(tmp_path: Path, strange: str) -> None:
    tensors = {f"unet.{TO_OUT}.lora_A.weight": DOWN, f"unet.{TO_OUT}.lora_B.weight": UP, strange: UP}
    path = write_safetensors(tmp_path / "l.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        read_lora(path)
    assert str(caught.value) == (
        f"LoRA {path}: 1 of its 3 keys are of an unknown kind, the first is {strange}; known are lora_down/lora_up "
        "with alpha, lora_A/lora_B and lora.down/lora.up (no DoRA, LoHa, LoKr)"
    )


@pytest.mark.parametrize(
    "other", [f"lora_unet_{TO_OUT.replace('.', '_')}.lora_", f"{TO_OUT}.lora.", f"unet.{TO_OUT}.lora."]
)
def test_a_module_in_two_spellings_is_refused(tmp_path: Path, other: str) -> None:
    keys = [f"unet.{TO_OUT}.lora_A.weight", f"unet.{TO_OUT}.lora_B.weight", f"{other}down.weight", f"{other}up.weight"]
    path = write_safetensors(tmp_path / "l.safetensors", dict(zip(keys, [DOWN, UP, DOWN, UP], strict=True)))
    with pytest.raises(CheckpointError, match=r"are the same module, spelled twice|given twice, in two spellings"):
        read_lora(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_values_that_are_not_finite(tmp_path: Path, key: str, value: float) -> None:
    tensors = {"lora_A.weight": DOWN.copy(), "lora_B.weight": UP.copy(), "alpha": np.array(1.0)}
    tensors[key].flat[-1] = value
    path = write_safetensors(tmp_path / "l.safetensors", {f"unet.{TO_OUT}.{k}": t for k, t in tensors.items()})
    with pytest.raises(CheckpointError) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and f"unet.{TO_OUT}.{key} holds values that are not finite" in str(
        caught.value
    )


def test_one_of_nan_is_named_whoever_opens_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is opened or built. (The exporter reads it with the same `read_lora`.)"""
    down, up = np.full((2, 16), np.nan), np.zeros((16, 2))
    name = "unet.conv_in"
    path = tmp_path / "failed.safetensors"
    write_safetensors(path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    for command in (
        ["generate", "a star", "--model", "demo-vegart", "--lora", str(path), "-o", str(tmp_path / "x.png")],
        ["build", "demo-vegart", "--engine", "tensorrt-rtx", "--lora", str(path)],
        ["serve", "--check", "--lora", f"demo-vegart={path}", "--data", str(tmp_path / "data")],
    ):
        assert main(command) == 1, command
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{path}: {name}.lora_A.weight holds values that are not finite" in error


def test_damaged_files(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "l.safetensors", {f"unet.{TO_OUT}.lora_A.weight": DOWN})
    with pytest.raises(CheckpointError, match=rf"unet\.{TO_OUT} lacks its up weight; fetch it again"):
        read_lora(path)
    whole = path.read_bytes()
    for damaged, text in (
        (whole[:-1], "bytes, its header says"),
        (whole[:20], "no safetensors file"),
        (b"", "no safetensors file"),
        (whole[:9] + b"!" + whole[10:], "its header is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=text):
            read_lora(path)
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(whole)
    with pytest.raises(CheckpointError) as caught:
        read_lora(pickled)
    assert str(caught.value) == (
        f"LoRA {pickled} is not a .safetensors file; others are pickled and can run code when read: "
        "convert it to safetensors where you trust it"
    )
    write_safetensors(path, {f"unet.{TO_OUT}.lora_A.weight": DOWN, f"unet.{TO_OUT}.lora_B.weight": UP.T})
    with pytest.raises(CheckpointError, match=r"attn1\.to_out\.0 has down 2x5 and up 2x6, which do not multiply"):
        read_lora(path)
    write_safetensors(path, {"x.alpha": np.array(1.0)}, dtype="I32")
    with pytest.raises(CheckpointError, match=r"x\.alpha is stored as I32; allowed: F64, F32, F16, BF16"):
        read_lora(path)
    names = [f"unet.{TO_OUT}.lora_A.weight", f"unet.{TO_OUT}.lora_B.weight", f"unet.{TO_OUT}.alpha"]
    write_safetensors(path, dict(zip(names, [DOWN[:0], UP[:, :0], np.array(1.0)], strict=True)))
    with pytest.raises(CheckpointError, match="has down 0x5 and up 6x0, which do not multiply"):
        read_lora(path)
    write_safetensors(path, dict(zip(names, [DOWN, UP, np.array([1.0, 2.0])], strict=True)))
    with pytest.raises(CheckpointError, match=r"the alpha of unet\..* has 2 values; it must be one number"):
        read_lora(path)
    write_safetensors(path, dict(zip(names, [DOWN, UP], strict=False)), {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="is no JSON object; fetch it again"):
        read_lora(path)
    wrong: list[dict[str, Any]] = [{"lora_alpha": value} for value in (None, "x", {}, math.inf)]
    wrong += [{"alpha_pattern": value} for value in ([1], {"(": 1}, {".*": "x"})]
    for config in wrong:
        told = json.dumps({f"unet.{key}": value for key, value in config.items()})
        write_safetensors(path, dict(zip(names, [DOWN, UP], strict=False)), {"lora_adapter_metadata": told})
        with pytest.raises(CheckpointError) as caught:
            read_lora(path)
        assert re.fullmatch(
            rf"LoRA: {re.escape(str(path))} says no alpha for unet\.{TO_OUT} \(lora_alpha .*, alpha_pattern .*\); "
            "it must be a finite number; fetch it again",
            str(caught.value),
        )
    path.write_bytes(whole.replace(b"[2, 5]", b"[2, 4]"))
    with pytest.raises(CheckpointError, match=r"has 40 bytes, which are not \(2, 4\) of F32"):
        read_lora(path)
    headers = [b'{"__metadata__": [1]}', b'{"__metadata__": {"a": 1}}', b"[" * 20_000]
    headers.append(b'{"x": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}')
    for damaged in (
        whole.replace(b"[0, 40]", b'["a",4]'), *(len(header).to_bytes(8, "little") + header for header in headers),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="its header is damaged"):
            read_lora(path)
    write_safetensors(path, {})
    with pytest.raises(CheckpointError, match="0 of its 0 keys are of an unknown kind; known are"):
        read_lora(path)


def test_reader_agrees_with_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(2.5, np.float64)}
    safetensors.save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    got, metadata = read_float32(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and got.keys() == tensors.keys()
    for name, array in tensors.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array)
