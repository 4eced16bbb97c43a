"""LoRAs added as a bundle is opened, on graphs small enough to be worked out by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vega_edge import engines
from vega_edge.bundle import Bundle, describe_files, write_manifest
from vega_edge.engines import open_engine
from vega_edge.engines.choice import missing_here
from vega_edge.errors import BundleError, CheckpointError, EngineError
from vega_edge.manifest import ROOT_PART, Manifest, Parameter, Part, Source
from vega_edge.onnx_file import from_stored, to_stored
from vega_edge.runtime.parts import Parts
from vega_edge.runtime.patches import Patches

from .test_lora import write_safetensors
from .test_onnx_file import KINDS, tensor

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

LINEAR, CONV = "mid.to_q.weight", "mid.conv1.weight"
RANDOM = np.random.default_rng(0)
WEIGHTS = {LINEAR: RANDOM.standard_normal((32, 24), np.float32), CONV: RANDOM.standard_normal((8, 4, 3, 3), np.float32)}
X = {"x": RANDOM.standard_normal((1, 24), np.float32), "y": RANDOM.standard_normal((1, 4, 5, 5), np.float32)}
CPU = ["onnxruntime-cpu", "openvino"]


def graph(path: Path, dtype: str, outside: bool) -> None:
    """x @ W.T, as the exporter stores a Linear, and a convolution; half weights are cast, as the exporter does."""
    stored = {LINEAR: WEIGHTS[LINEAR].T.copy(), CONV: WEIGHTS[CONV]}
    nodes, names = [], dict(zip(stored, stored, strict=True))
    if dtype != "fp32":
        names = {name: f"{name}.float32" for name in stored}
        nodes = [helper.make_node("Cast", [n], [c], to=TensorProto.FLOAT) for n, c in names.items()]
    nodes += [
        helper.make_node("MatMul", ["x", names[LINEAR]], ["a"]),
        helper.make_node("Conv", ["y", names[CONV]], ["b"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in X.items()]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "ab"]
    tensors = [tensor(n, v, dtype) for n, v in stored.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, initializer=tensors),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=outside, location="model.onnx_data", size_threshold=0)


def make_bundle(
    folder: Path, dtype: str = "fp32", outside: bool = True, maps: bool = True, weights: str | None = None
) -> Bundle:
    graph(folder / "unet" / "model.onnx", dtype, outside)
    (folder / "model_index.json").write_text("{}")
    places = {LINEAR: Parameter(LINEAR, True), CONV: Parameter(CONV, False)}
    parts = {
        ROOT_PART: Part(describe_files(folder, ROOT_PART)),
        "unet": Part(describe_files(folder, "unet"), None, places if maps else None),
    }
    stored: Any = weights or ("fp16" if dtype == "bf16" else dtype)
    write_manifest(folder, Manifest("toy", "a test", "fp32", stored, Source("toy"), {}, {}, parts))
    return Bundle.open(folder)


def lora(path: Path, seed: int = 1, **layers: Any) -> Path:
    random = np.random.default_rng(seed)
    tensors = layers or {
        "unet.mid.to_q.lora_A.weight": random.standard_normal((2, 24)), "unet.mid.to_q.lora_B.weight": random.standard_normal((32, 2)),
        "unet.mid.conv1.lora_A.weight": random.standard_normal((2, 4, 3, 3)), "unet.mid.conv1.lora_B.weight": random.standard_normal((8, 2, 1, 1)),
    }  # fmt: skip
    return write_safetensors(path, {k: np.asarray(v, np.float32) for k, v in tensors.items()})


def fused(dtype: str, *files: tuple[Path, float]) -> dict[str, NDArray[np.float32]]:
    """What the weights should be: added in float32 in turn, rounded once to what is stored."""
    from vega_edge.safetensors_file import read_float32

    out = {}
    for name, weight in WEIGHTS.items():
        value, module = from_stored(to_stored(weight, dtype)).reshape(weight.shape), name.removesuffix(".weight")
        for path, strength in files:
            t = read_float32(path)[0]
            up, down = t[f"unet.{module}.lora_B.weight"], t[f"unet.{module}.lora_A.weight"]
            value = value + np.float32(strength) * np.einsum("or,ri...->oi...", up.reshape(len(up), -1), down)
        out[name] = from_stored(to_stored(value, dtype)).reshape(weight.shape)
    return out


def outputs(weights: dict[str, NDArray[np.float32]]) -> tuple[NDArray[Any], NDArray[Any]]:
    windows = np.lib.stride_tricks.sliding_window_view(X["y"][0], (3, 3), (1, 2))
    return X["x"] @ weights[LINEAR].T, np.einsum("cxyhw,ochw->oxy", windows, weights[CONV])[None]


def run(parts: Parts) -> list[NDArray[Any]]:
    with parts.part("unet/model.onnx").running() as engine:
        return [engine.run(X)[name] for name in "ab"]


@pytest.mark.parametrize("outside", [True, False], ids=["beside", "inside"])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize("low", [False, True], ids=["normal", "low"])
def test_patched_weights_run_and_go_away(tmp_path: Path, engine: str, dtype: str, outside: bool, low: bool) -> None:
    if missing := missing_here(engine):
        pytest.skip(missing.why)
    bundle = make_bundle(tmp_path / "bundle", dtype, outside)
    files = [(lora(tmp_path / "a.safetensors"), 0.75), (lora(tmp_path / "b.safetensors", 2), -0.5)]
    cache = tmp_path / "cache"
    before = run(Parts(bundle, engine, None, low, cache))
    for expected, got in zip(outputs(fused(dtype)), before, strict=True):
        assert np.allclose(got, expected, atol=1e-5)
    patched = run(Parts(bundle, engine, Patches(bundle, files), low, cache))
    for expected, got, original in zip(outputs(fused(dtype, *files)), patched, before, strict=True):
        assert np.allclose(got, expected, atol=2e-5) and np.abs(got - original).max() > 0.5
    again = run(Parts(bundle, engine, None, low, cache))
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    changed = run(Parts(bundle, engine, Patches(bundle, [(files[0][0], 0.5)]), low, cache))
    assert np.abs(changed[0] - patched[0]).max() > 0.1  # another strength is another entry in the cache
    assert hashes(bundle.path) == {n: e.sha256 for p in bundle.manifest.parts.values() for n, e in p.files.items()}  # type: ignore[union-attr]


def hashes(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "vega-edge.json")
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("dtype", KINDS)
def test_the_very_weights_that_fusing_gives(tmp_path: Path, dtype: str) -> None:
    bundle, path = make_bundle(tmp_path / "bundle", dtype), lora(tmp_path / "a.safetensors")
    got = Patches(bundle, [(path, 0.75)]).of("unet")
    expected = fused(dtype, (path, 0.75))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        patch = from_stored(got[name])
        assert np.allclose(patch.T if name == LINEAR else patch, value, rtol=2**-7 if dtype == "bf16" else 2**-10)
    assert Patches(bundle, []).of("unet") == {} and Patches(bundle, [(path, 1.0)]).of("text_encoder") == {}


def test_bundles_that_take_no_lora(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    cure = "export it again, or fuse the LoRA as you export: vega-edge export MODEL -o BUNDLE --lora FILE"
    mapless = make_bundle(tmp_path / "mapless", maps=False)
    foreign = make_bundle(tmp_path / "foreign")
    (foreign.path / "vega-edge.json").unlink()
    foreign = Bundle.open(foreign.path)
    cases = [
        (mapless, f"its manifest does not say where each weight is; {cure}"),
        (foreign, f"another tool made it, without our manifest; {cure}"),
    ]
    for bundle, message in cases:
        with pytest.raises(BundleError) as error:
            Patches(bundle, [(path, 1.0)])
        assert str(error.value) == f"bundle {bundle.path} can't take a LoRA: {message}"
        assert Patches(bundle, []).of("unet") == {}


def test_integer_weights_take_no_lora(tmp_path: Path) -> None:
    bundle, path = make_bundle(tmp_path / "bundle"), lora(tmp_path / "a.safetensors")
    object.__setattr__(bundle.manifest, "weights", "int8")
    with pytest.raises(BundleError) as error:
        Patches(bundle, [(path, 1.0)])
    assert (
        str(error.value)
        == f"bundle {bundle.path} can't take a LoRA: its weights are int8; use one of fp32, fp16 or bf16"
    )


def test_a_map_that_is_wrong(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle.path / "vega-edge.json").read_text())
    manifest["parts"]["unet"]["parameters"][CONV]["initializer"] = "elsewhere"
    (bundle.path / "vega-edge.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as error:
        Patches(Bundle.open(bundle.path), [(lora(tmp_path / "a.safetensors"), 1.0)])
    message = "unet/model.onnx does not hold elsewhere as numbers, though its manifest says so; export it again"
    assert str(error.value) == f"bundle {bundle.path} can't take a LoRA: {message}"


def test_a_lora_of_strength_0_is_none(tmp_path: Path) -> None:
    """So that what was compiled or built of the bundle's own weights is taken."""
    bundle = make_bundle(tmp_path / "bundle", "fp16")
    files = [(lora(tmp_path / "a.safetensors"), 0.0), (lora(tmp_path / "b.safetensors", 2), 0.5)]
    nothing, one = Patches(bundle, files[:1]), Patches(bundle, files)
    assert (nothing.parts, nothing.hashes, nothing.key, nothing.of("unet")) == (frozenset(), (), "", {})
    assert nothing.loras == tuple(files[:1])  # as it was asked for
    alone = Patches(bundle, files[1:])
    assert (one.parts, one.hashes, one.key) == (alone.parts, alone.hashes, alone.key)
    for name, values in alone.of("unet").items():
        np.testing.assert_array_equal(one.of("unet")[name], values)


def test_loras_that_do_not_fit(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "fp16")
    other = lora(
        tmp_path / "other.safetensors",
        **{"unet.x.to_q.lora_A.weight": np.ones((2, 24)), "unet.x.to_q.lora_B.weight": np.ones((32, 2))},
    )
    with pytest.raises(CheckpointError, match=r"1 of its 1 modules fit nothing .*the first is unet\.x\.to_q"):
        Patches(bundle, [(other, 1.0)])
    with pytest.raises(CheckpointError, match="1 of its 1 modules fit nothing"):
        Patches(bundle, [(other, 0.0)])
    path = lora(tmp_path / "a.safetensors")
    for strength in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError) as error:
            Patches(bundle, [(path, strength)])
        assert (
            str(error.value) == f"LoRA {path}: its strength is {strength}; it must be a finite number, 1 is as trained"
        )
    with pytest.raises(CheckpointError) as error:
        Patches(bundle, [(path, 1e6)]).of("unet")
    assert "beyond fp16's 65504; lower its strength, or export the bundle with weights fp32" in str(error.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nothing": np.zeros(2, np.float32)}, " has no initializer 'nothing' whose values could be replaced"),
        ({LINEAR: np.zeros((32, 24), np.float32)}, f": initializer {LINEAR!r} is float32[24, 32], got float32[32, 24]"),
        ({LINEAR: np.zeros((24, 32), np.float16)}, f": initializer {LINEAR!r} is float32[24, 32], got float16[24, 32]"),
    ],
)
@pytest.mark.parametrize("engine", CPU)
def test_weights_that_do_not_fit_the_graph(tmp_path: Path, engine: str, weights: dict[str, Any], message: str) -> None:
    path = tmp_path / "unet" / "model.onnx"
    graph(path, "fp32", True)
    if missing_here(engine):
        pytest.skip("not installed")
    with pytest.raises(EngineError) as error:
        open_engine(path, engine, weights=weights)
    assert str(error.value) == f"{path}{message}"
    assert engines.ENGINES
