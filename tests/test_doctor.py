"""The doctor's facts and their text."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from vega_edge import doctor, engines
from vega_edge.cli import main
from vega_edge.engines import EngineStatus, nvidia
from vega_edge.engines.choice import Missing
from vega_edge.models import recipes
from vega_edge.runtime.pipeline import Pipeline

MISSING = Missing("it is not here", "")


@pytest.fixture
def installed(monkeypatch):
    """The packages that this test pretends are installed."""
    versions = {"numpy": "2.4.6", "onnxruntime": "1.31.1"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_this_machine_fits_into_json():
    report = doctor.examine()
    again = json.loads(json.dumps(report.to_dict()))
    assert [engine["name"] for engine in again["engines"]] == list(engines.ENGINES)
    assert again["packages"]["numpy"] == metadata.version("numpy")
    assert again["cores"] >= 1
    assert again["cpu"]
    assert bool(again["gpus"]) == (again["why_no_gpu"] == "")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu"),
        (["onnxruntime-gpu", "onnxruntime-directml"], "onnxruntime-gpu and onnxruntime-directml"),
    ],
)
def test_two_onnxruntimes_are_a_warning(installed, names, shown):
    installed.clear()
    installed.update(dict.fromkeys(names, "1.31.1"))
    assert doctor.examine().warnings == (
        f"{shown} are both installed and overwrite each other's files: pip uninstall {' '.join(names)}, "
        'then pip install "vega-edge[cuda]" for an NVIDIA GPU or "vega-edge[cpu]"',
    )


def test_one_onnxruntime_is_none(installed):
    assert doctor.examine().warnings == ()


def test_no_engine_is_a_warning(monkeypatch, installed):
    monkeypatch.setattr(
        engines, "best_engine", lambda model_bytes=None, device=None: ("", ["openvino (it is not installed)"])
    )
    report = doctor.examine()
    assert (report.auto, report.passed_over) == ("", ("openvino (it is not installed)",))
    assert report.warnings == ('no engine can be used; pip install "vega-edge[cpu]"',)
    assert "Engines (auto takes none)" in doctor.render(report)


def test_auto_may_take_another_engine_for_a_small_model(monkeypatch):
    """`generate` with the model of the package takes what is told for small ones."""
    monkeypatch.setattr(engines.choice, "missing_here", lambda name: None if "tensor" not in name else MISSING)
    monkeypatch.setattr(engines.choice, "_not_loaded", lambda name: MISSING)
    report = doctor.examine()
    assert (report.auto, report.auto_small) == ("openvino", "onnxruntime-cpu")
    assert "Engines (auto takes openvino; onnxruntime-cpu for models below 100 MB)" in doctor.render(report)


def test_what_doctor_tells_of_auto_is_what_the_packaged_model_is_drawn_with():
    pipe = Pipeline.open("demo-vegart")
    assert pipe.engine == doctor.examine().auto_small
    pipe.close()


def test_what_auto_takes_for_a_bundle(monkeypatch, capsys):
    """With what has been built of it, which no general answer can know."""
    bundle = recipes()["demo-vegart"].bundle_path
    asked = []

    def best_engine(size, built, device, precision):
        asked.append((size, built.bundle, device, precision))
        return "tensorrt-rtx", ["tensorrt (it is not installed)"]

    monkeypatch.setattr(engines, "best_engine", best_engine)
    assert main(["doctor", "demo-vegart", "--device", "cuda:1"]) == 0
    assert asked == [(sum(f.stat().st_size for f in bundle.glob("*/*.onnx*")), bundle, "cuda:1", ("fp32", "fp16"))]
    told = capsys.readouterr().out
    assert f"Engines (auto takes tensorrt-rtx for {bundle})\n" in told
    assert "  auto passes over tensorrt (it is not installed)\n" in told


def test_a_bundle_that_draws_with_its_small_decoder_needs_no_other(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(engines, "best_engine", lambda size, built, *more: asked.append(built.unused) or ("fake", []))
    for more in ([], ["--vae", "tiny"]):
        assert main(["doctor", "demo-vegart", *more]) == 0
    assert asked == [frozenset(), frozenset({"vae_decoder"})]
    capsys.readouterr()
    assert (main(["doctor", "demo-vegart", "--vae", "small"]), main(["doctor", "--vae", "tiny"])) == (2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "vega-edge: unknown vae 'small'; there are: full, tiny",
        "vega-edge: doctor --vae is about a BUNDLE: name one",
    ]


def test_doctor_of_a_bundle_that_is_not_there(capsys):
    assert main(["doctor", "nowhere/at-all"]) == 1
    assert capsys.readouterr().err.startswith("vega-edge: ")


def test_gpus(monkeypatch):
    monkeypatch.setattr(nvidia, "devices", lambda: ["NVIDIA RTX A2000", "NVIDIA T4"])
    report = doctor.examine()
    assert (report.gpus, report.why_no_gpu) == (("NVIDIA RTX A2000", "NVIDIA T4"), "")
    assert "GPU: NVIDIA RTX A2000, NVIDIA T4\n" in doctor.render(report)


def test_folders_of_bundles(tmp_path):
    for name in ("small", "vegart"):
        (tmp_path / "there" / name).mkdir(parents=True)
        (tmp_path / "there" / name / "model_index.json").write_text("{}")
    (tmp_path / "there" / "other").mkdir()
    report = doctor.examine([tmp_path / "there", tmp_path / "nowhere"])
    assert report.bundle_folders == (
        doctor.BundleFolder(str(tmp_path / "there"), ("small", "vegart"), 4),
        doctor.BundleFolder(str(tmp_path / "nowhere"), (), 0),
    )


def test_the_text():
    report = doctor.Report(
        version="0.1.0",
        python="3.11.7",
        system="Linux 6.1 x86_64",
        cpu="AMD EPYC",
        cores=2,
        gpus=(),
        why_no_gpu="the NVIDIA driver shows no GPU",
        packages={"numpy": "2.4.6", "torch": ""},
        engines=(
            EngineStatus("onnxruntime-cpu", True, "1.31.1", "CPU"),
            EngineStatus("openvino", False, why_not="openvino is not installed", install="pip install it"),
            EngineStatus("openvino-bf16", False, why_not="no bf16"),
        ),
        auto="onnxruntime-cpu",
        auto_small="onnxruntime-cpu",
        small_bytes=100_000_000,
        passed_over=("openvino (openvino is not installed)",),
        bundle_folders=(doctor.BundleFolder("/b", ("a", "c"), 12_340_000), doctor.BundleFolder("/n", (), 0)),
        warnings=("beware",),
    )
    assert doctor.render(report).splitlines() == [
        "vega-edge 0.1.0, Python 3.11.7, Linux 6.1 x86_64",
        "CPU: AMD EPYC, 2 logical cores",
        "GPU: none: the NVIDIA driver shows no GPU",
        "",
        "Engines (auto takes onnxruntime-cpu)",
        "  onnxruntime-cpu  ok  1.31.1 on CPU",
        "  openvino         no  openvino is not installed; pip install it",
        "  openvino-bf16    no  no bf16",
        "  auto passes over openvino (openvino is not installed)",
        "",
        "Packages",
        "  numpy  2.4.6",
        "  torch  -",
        "",
        "Bundles",
        "  /b: a, c (12.3 MB)",
        "  /n: none (0.0 MB)",
        "",
        "WARNING: beware",
    ]
