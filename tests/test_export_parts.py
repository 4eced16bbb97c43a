"""The pieces of export on graphs small enough to see through: storage, names, pixels, tolerances, tokenizer files."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from vega_edge.engines import open_engine  # noqa: E402
from vega_edge.errors import ExportError  # noqa: E402
from vega_edge.export import check, onnx_edit, samples  # noqa: E402
from vega_edge.export.quiet import quiet  # noqa: E402
from vega_edge.export.tokenizer_files import load_tokenizer, token_ids, write_tokenizer  # noqa: E402

from . import checkpoints  # noqa: E402

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
RANDOM = np.random.default_rng(0)


def model(
    nodes: list[Any],
    weights: dict[str, NDArray[Any]],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    kind: int = FLOAT,
) -> ir.Model:
    infos = [
        [helper.make_tensor_value_info(n, kind, axes) for n, axes in values.items()] for values in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *infos, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def chain(weights: dict[str, NDArray[Any]]) -> ir.Model:
    """x @ w0 @ w1 ..., each [9, 9]."""
    values = ["x", *(f"x{i}" for i in range(1, len(weights))), "y"]
    nodes = [helper.make_node("MatMul", [values[i], w], [values[i + 1]]) for i, w in enumerate(weights)]
    return model(nodes, weights, {"x": ["n", 9]}, {"y": ["n", 9]})


def run(path: Path, **feeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
    engine = open_engine(path, "onnxruntime-cpu", threads=1)
    try:
        return engine.run(feeds)
    finally:
        engine.close()


CONFIGS: list[dict[str, Any]] = [
    {"scaling_factor": 0.13025},
    {"scaling_factor": 0.5, "latents_mean": None, "latents_std": None},
    {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.5, 0.5, 2.0]},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_pixels_are_diffusers_arithmetic(tmp_path: Path, config: dict[str, Any], kind: int) -> None:
    """On a decoder that does nothing: scaling, clamp and rounding are all there is."""
    axes = {"latent_sample": ["batch", 3, "height", "width"]}
    identity = model(
        [helper.make_node("Identity", ["latent_sample"], ["sample"])],
        {},
        axes,
        {"sample": ["batch", 3, "h", "w"]},
        kind,
    )
    onnx_edit.save(identity, tmp_path / "model.onnx")
    onnx_edit.save_pixels(tmp_path / "model.onnx", tmp_path / "pixels.onnx", config)
    dtype = np.float16 if kind == HALF else np.float32
    latents = np.linspace(-1, 1, 2 * 3 * 40 * 50).reshape(2, 3, 40, 50).astype(dtype)
    got = run(tmp_path / "pixels.onnx", latent_sample=latents)["pixels"]
    assert got.shape == (2, 40, 50, 3) and got.dtype == np.uint8
    wanted = samples.pixels(samples.unscaled(torch.from_numpy(latents), config))
    assert wanted.std() > 50
    if kind == FLOAT:
        np.testing.assert_array_equal(got, wanted)
    else:  # torch rounds to half after each operation, an engine may do so less often
        difference = np.abs(got.astype(int) - wanted)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_unscaling_is_the_pipelines() -> None:
    """The reference above, against numbers worked out by hand."""
    latents = torch.tensor([1.0, 2.0, -1.0]).view(1, 3, 1, 1)
    wanted = ([7.677543, 15.355086, -7.677543], [2.0, 4.0, -2.0], [3.1, 1.8, -3.7])
    for config, values in zip(CONFIGS, wanted, strict=True):
        np.testing.assert_allclose(samples.unscaled(latents, config).flatten(), values, rtol=1e-6)


def test_tolerance_is_kept(tmp_path: Path) -> None:
    graph = chain({"w": np.eye(9, dtype=np.float32)})
    onnx_edit.save(graph, tmp_path / "model.onnx")
    x = RANDOM.standard_normal((2, 9)).astype(np.float32)
    x[0, 0] = 4.0

    def compare(wanted: NDArray[Any], part: str = "unet", dtype: str = "fp32") -> float:
        return check.compare(part, tmp_path / "model.onnx", dtype, [({"x": x}, {"y": wanted}), ({"x": x}, {"y": x})])

    off = x.copy()
    off[1, 3] += 0.004
    assert compare(x) == 0
    assert compare(off, dtype="fp16") == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ExportError) as caught:
        compare(off)
    assert str(caught.value) == (
        "unet: differs from torch by 1.0e-03 of the largest value in fp32, allowed is 2e-04; "
        "this is a defect of the export: please report it"
    )
    with pytest.raises(ExportError, match=r"differs from torch by 1\.0e-03 .* allowed is 5e-05"):
        compare(off, "text_encoder_2")
    with pytest.raises(ExportError, match=r"export it with dtype fp32$"):
        compare(off * 2, dtype="fp16")
    with pytest.raises(ExportError, match=r"unet: y has shape \[2, 9\], torch's has \[1, 9\]"):
        compare(x[:1])
    x[0, 0] = np.nan
    with pytest.raises(ExportError, match=r"unet: y is not finite \(overflow\)"):
        compare(x)


def test_pixel_tolerance_is_kept(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.UINT8)
    graph = model([node], {}, {"x": ["n", 4]}, {"pixels": ["n", 4]})
    graph.graph.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    onnx_edit.save(graph, tmp_path / "pixels.onnx")
    x = np.array([[0, 100, 200, 255]], np.float32)

    def compare(wanted: Any, dtype: str = "fp32") -> int:
        return check.compare_pixels(
            "vae_decoder", tmp_path / "pixels.onnx", dtype, [({"x": x}, {"pixels": np.array(wanted, np.uint8)})]
        )

    assert (compare([[0, 100, 200, 255]]), compare([[0, 101, 200, 254]]), compare([[2, 100, 200, 255]], "fp16")) == (
        0,
        1,
        2,
    )
    with pytest.raises(ExportError) as caught:
        compare([[2, 100, 200, 255]])
    assert str(caught.value) == "vae_decoder: pixels differ from torch's by 2 levels in fp32, allowed is 1"
    with pytest.raises(ExportError, match=r"pixels are uint8\[1, 4\], expected uint8\[4\]"):
        compare([0, 100, 200, 255])


@pytest.mark.parametrize(
    "kept",
    [
        ("vocab.json", "merges.txt"),
        ("tokenizer.json",),
        ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"),
    ],
)
def test_missing_tokenizer_files_are_made(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """Published folders have vocab.json and merges.txt; transformers 5 writes only tokenizer.json."""
    whole, source = tmp_path / "whole", tmp_path / "source"
    checkpoints.write_tokenizer(whole, "!")
    shutil.copytree(whole, source)
    if "tokenizer.json" in kept:
        load_tokenizer(whole).save_pretrained(source)
        kept = ("tokenizer.json", "tokenizer_config.json")
    for path in source.iterdir():
        if path.name not in kept:
            path.unlink()
    tokenizer = load_tokenizer(source)
    write_tokenizer(source, tmp_path / "made", tokenizer)
    made = {path.name: path for path in (tmp_path / "made").iterdir()}
    assert made.keys() == {
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "tokenizer.json",
    }
    assert json.loads(made["vocab.json"].read_text("utf-8")) == json.loads((whole / "vocab.json").read_text("utf-8"))
    assert made["merges.txt"].read_text("utf-8") == (whole / "merges.txt").read_text("utf-8")
    if "special_tokens_map.json" in kept or "tokenizer.json" in kept:  # else nothing says what the padding is
        assert json.loads(made["special_tokens_map.json"].read_text("utf-8"))["pad_token"] == "!"
    ids = token_ids(tokenizer, ["Red cat", "red " * 90])
    pad = 0 if tokenizer.pad_token == "!" else 517
    assert ids.shape == (2, 77) and ids[0].tolist() == [516, 513, 515, 517, *[pad] * 73]
    assert ids[1].tolist() == [516, *[513] * 75, 517]


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("noisy")
    handler = logging.StreamHandler(sys.stderr)  # as torch's and transformers', which keep the stream they began with
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with quiet():
            print("printed")
            logger.critical("logged")
            warnings.warn("warned", stacklevel=1)
        assert capfd.readouterr() == ("", "") and warned == []
        print("printed")
        logger.critical("logged")
        warnings.warn("warned", stacklevel=1)
    assert capfd.readouterr() == ("printed\n", "logged\n") and len(warned) == 1
    logger.removeHandler(handler)
    assert logging.root.manager.disable == 0


def test_pictures_have_what_a_comparison_needs() -> None:
    """Both ends of the range, edges, no symmetry that would hide a flipped axis; noise grows with the timestep."""
    picture = samples.picture(samples.Size(2, 8, 6), scale=4)
    assert picture.shape == (2, 3, 32, 24) and picture.min() < -0.9 and picture.max() > 0.7
    assert not torch.allclose(picture[0], picture[0].flip(-1)) and not torch.allclose(picture[0], picture[1])
    scheduler = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }
    clean = torch.ones(1, 4, 8, 8)
    means = [samples.noised(clean, t, scheduler).mean().item() for t in samples.timesteps(scheduler)]
    assert samples.timesteps(scheduler) == (999.0, 261.25) and samples.timesteps({"num_train_timesteps": 1}) == (
        0,
        0.25,
    )
    assert means[0] < 0.3 < means[1] < 1.1
    first, second = samples.latent_sizes({"block_out_channels": (1, 2, 3), "sample_size": 128})
    assert (first, second) == (samples.Size(1, 16, 16), samples.Size(2, 20, 16))
    assert samples.latent_sizes({"block_out_channels": (1,) * 4, "sample_size": 12})[0] == samples.Size(1, 16, 16)
