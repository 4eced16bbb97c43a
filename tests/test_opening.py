"""Wrong values, of `Pipeline.open` and on the command line: each one line that says what is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vega_edge import Pipeline
from vega_edge.cli import main
from vega_edge.errors import BundleError, UsageError, unknown
from vega_edge.manifest import MANIFEST
from vega_edge.models import find_bundle
from vega_edge.runtime.opening import checked_loras, foreign_defaults
from vega_edge.verbs.export import _progress

ENGINES = (
    "auto, onnxruntime-cpu, onnxruntime-cuda, onnxruntime-tensorrt, openvino, openvino-bf16, tensorrt, tensorrt-rtx"
)
PAIRS = "loras must be pairs of file and strength, such as [('style.safetensors', 0.8)], got"


@pytest.mark.parametrize(("options", "message"), [
    ({"model": None}, "model must be a model's name or a bundle's folder, got None"),
    ({"model": b"demo-vegart"}, "model must be a model's name or a bundle's folder, got b'demo-vegart'"),
    ({"engine": None}, f"unknown engine None; there are: {ENGINES}"),
    ({"engine": 3}, f"unknown engine 3; there are: {ENGINES}"),
    ({"vae": 1}, "unknown vae 1; there are: full, tiny"),
    ({"memory": None}, "unknown memory None; there are: low, normal"),
    ({"device": 0}, "device must be cpu, cuda or cuda:N, such as cuda:0, not 0"),
    ({"device": ""}, "device must be cpu, cuda or cuda:N, such as cuda:0, not ''"),
    ({"loras": None}, f"{PAIRS} None"),
    ({"loras": "x.safetensors"}, f"{PAIRS} 'x.safetensors'"),
    ({"loras": ["x.safetensors"]}, f"{PAIRS} 'x.safetensors'"),
    ({"loras": ["ab"]}, f"{PAIRS} 'ab'"),
    ({"loras": [(3, 1.0)]}, f"{PAIRS} (3, 1.0)"),
    ({"loras": [("x", 1.0, 2)]}, f"{PAIRS} ('x', 1.0, 2)"),
    ({"loras": [("x", "a")]}, "LoRA x: its strength is 'a'; it must be a finite number, 1 is as trained"),
    ({"loras": [("x", True)]}, "LoRA x: its strength is True; it must be a finite number, 1 is as trained"),
    ({"loras": [("x", float("nan"))]}, "LoRA x: its strength is nan; it must be a finite number, 1 is as trained"),
])  # fmt: skip
def test_what_a_pipeline_is_opened_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Pipeline.open(**{"model": "demo-vegart", **options})
    assert str(error.value) == message


@pytest.mark.parametrize(("part", "key", "value", "fault"), [
    ("unet", "sample_size", None, "has no sample_size, which must be a whole number from 1 to 4096"),
    ("unet", "sample_size", True, "has true for sample_size, which must be a whole number from 1 to 4096"),
    ("unet", "in_channels", 4.5, "has 4.5 for in_channels, which must be a whole number from 1 to 64"),
    ("unet", "block_out_channels", None, "has no block_out_channels, which must be a list of 1 to 8 numbers, one a level"),
    ("vae_decoder", "block_out_channels", "8", 'has "8" for block_out_channels, which must be a list of 1 to 8 numbers, one a level'),
])  # fmt: skip
def test_a_configuration_that_lacks_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, key: str, value: Any, fault: str
) -> None:
    """Told before any network is opened."""
    monkeypatch.setattr("vega_edge.runtime.parts.open_engine", lambda *a, **k: pytest.fail("opened"))
    bundle = shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle")
    (bundle / MANIFEST).unlink()
    config = bundle / part / "config.json"
    told = json.loads(config.read_text())
    told.pop(key)
    config.write_text(json.dumps(told if value is None else told | {key: value}))
    with pytest.raises(BundleError) as error:
        Pipeline.open(bundle, "onnxruntime-cpu")
    assert str(error.value) == (
        f"bundle {bundle}, part {part}: {part}/config.json {fault}; copy or export the bundle again"
    )


def test_loras_may_be_lists_and_generators() -> None:
    assert checked_loras(pair for pair in (["a.safetensors", 1], (Path("b"), 0.5))) == [
        (Path("a.safetensors").absolute(), 1.0),
        (Path("b").absolute(), 0.5),
    ]


def test_what_diffusers_assumes() -> None:
    few = foreign_defaults({"_class_name": "LCMScheduler"}, 64)
    assert few == {"family": "diffusers", "steps": 4, "guidance": 0.0, "width": 64, "height": 64}
    assert foreign_defaults({}, 512)["steps"] == 25


def test_a_word_that_one_name_alone_has() -> None:
    known = ["onnx-cuda", "onnx-cpu"]
    assert str(unknown("engine", "CUDA", known)) == (
        "unknown engine 'CUDA'; did you mean 'onnx-cuda'? there are: onnx-cpu, onnx-cuda"
    )
    assert str(unknown("engine", "x", ["a-x-onnx", "b-x-onnx"])) == "unknown engine 'x'; there are: a-x-onnx, b-x-onnx"
    assert str(unknown("engine", "", known)) == "unknown engine ''; there are: onnx-cpu, onnx-cuda"


WHOLE, NUMBER = "must be a whole number, got 'x'", "must be a number, such as 7.5, got '0,5'"
LORA = "argument --lora: must be FILE or FILE:STRENGTH, such as style.safetensors:0.8, got"


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "a", "--samples", "x"], f"argument --samples: {WHOLE}"),
    (["generate", "a", "--seed", "x"], f"argument --seed: {WHOLE}"),
    (["generate", "a", "--guidance", "0,5"], f"argument --guidance: {NUMBER}"),
    (["generate", "a", "--eta", "0,5"], f"argument --eta: {NUMBER}"),
    (["generate", "a", "-o", ""], "argument -o/--output: must be a file's name, such as picture.png, got ''"),
    (["generate", "a", "--image", ""], "argument --image: must be a file's name, such as picture.png, got ''"),
    (["generate", "a", "--lora", ""], f"{LORA} ''"),
    (["generate", "a", "--lora", ":0.5"], f"{LORA} ':0.5'"),
    (["generate", "a", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["bench", "--rounds", "x"], f"argument --rounds: {WHOLE}"),
    (["serve", "--port", "x"], f"argument --port: {WHOLE}"),
    (["serve", "--job-seconds", "0,5"], f"argument --job-seconds: {NUMBER}"),
])  # fmt: skip
def test_arguments_of_a_wrong_kind(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    verb = f"vega-edge {arguments[0]}"
    assert (end.value.code, capsys.readouterr().err) == (2, f"{verb}: {message}; see {verb} --help\n")


@pytest.mark.parametrize("samples", ["1", "2"])
@pytest.mark.parametrize(("output", "message"), [
    ("folder/", f"folder is a folder; name a file in it, such as {Path('folder/picture.png')}"),
    ("folder.png", f"folder.png is a folder; name a file in it, such as {Path('folder.png/picture.png')}"),
    ("keep.png/x.png", f"{Path('keep.png/x.png')}: keep.png is a file, not a folder; choose another name"),
    ("nope/x.png", f"{Path('nope/x.png')}: the folder nope does not exist; make it first"),
    ("star", "star: unknown picture format ''; use one of .png, .jpg, .jpeg, .webp"),
])  # fmt: skip
def test_where_no_picture_can_go(
    output: str, message: str, samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "keep.png").touch()
    assert main(["generate", "a star", "-o", output, "--samples", samples, "--model", "none"]) == 2
    assert capsys.readouterr().err == f"vega-edge: {message}\n"


@pytest.mark.parametrize("disable", [True, False])
def test_an_export_tells_of_its_parts_where_it_draws_no_bar(disable: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = SimpleNamespace(disable=disable, n=0, refresh=lambda: None)
    shown.set_description_str = lambda text, refresh: None
    shown.update = lambda n: setattr(shown, "n", shown.n + n)
    progress = _progress(shown)
    for i, (part, phase) in enumerate((p, f) for p in ("vae_decoder", "unet") for f in ("trace", "write")):
        progress(SimpleNamespace(part=part, phase=phase, index=i + 1, total=4))  # type: ignore[arg-type]
    lines = ["vega-edge: exporting vae_decoder, 0 of 4 phases done", "vega-edge: exporting unet, 2 of 4 phases done"]
    assert capsys.readouterr().err.splitlines() == (lines if disable else [])
    assert (shown.n, shown.total) == (3, 4)
