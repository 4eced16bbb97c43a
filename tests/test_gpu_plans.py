"""Plans of each kind on a GPU: stripped, refitted, streamed, of eight bits; and the second start with compiled kernels.

The UNet's plan is of the kind that is tested, the other parts' are ordinary ones.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil

import numpy as np
import pytest

from vega_edge import engines
from vega_edge.cli import main
from vega_edge.engines import nvidia
from vega_edge.engines.plan_store import PlanStore
from vega_edge.models import recipes

from .test_gpu import STATES, TOLERANCES, latents, lora_for, unet_feeds

pytestmark = pytest.mark.gpu
# Largest difference of one evaluation of the UNet from onnxruntime-cpu's with the graph as it is, relative to its largest
# value: what the rounding alone makes of the same graph on a CPU (int8 3.7e-3, fp8 3.8e-2) twice, and TF32's beside it.
ROUNDED = {"int8": 2 * 3.7e-3, "fp8": 2 * 3.8e-2}


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def engine(request):
    if not STATES[request.param].ok:
        pytest.skip(f"{request.param}: {STATES[request.param].why_not}")
    return request.param


@pytest.fixture(scope="module")
def others(engine, tmp_path_factory):
    """The embedded model's bundle with a plan of each part but the UNet."""
    folder = tmp_path_factory.mktemp(engine) / "demo"
    shutil.copytree(recipes()["demo-vegart"].bundle_path, folder)
    parts = [graph.parent.name for graph in engines.built_graphs(folder)]
    assert main(["build", str(folder), "--engine", engine, *options("--part", parts, but="unet")]) == 0
    return folder


def options(name, values, but=""):
    return [word for value in values if value != but for word in (name, value)]


@pytest.fixture
def build(others, engine, tmp_path, capsys):
    """build(*options) -> (bundle, the UNet's plan), of which there is no other."""

    def with_unet(*more):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "demo"
        shutil.copytree(others, folder)
        shutil.copytree(PlanStore(others).folder, PlanStore(folder).folder)
        capsys.readouterr()
        assert main(["build", str(folder), "--engine", engine, "--part", "unet", *more, "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        return folder, told

    return with_unet


def predicted(folder, engine):
    with contextlib.closing(engines.open_engine(folder / "unet" / "model.onnx", engine)) as opened:
        return opened.run(unet_feeds(opened.inputs))["out_sample"]


def difference(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    "flags", [("--static",), ("--stripped",), ("--stripped", "--refit"), ("--weight-streaming",)], ids=" ".join
)
def test_a_plan_of_each_kind_draws_the_same(build, engine, flags):
    folder, plan = build(*flags)
    assert set(plan["flags"]) == {flag.removeprefix("--") for flag in flags}
    assert difference(latents(folder, engine), latents(folder, "onnxruntime-cpu")) < TOLERANCES[engine]


@pytest.mark.parametrize("precision", list(ROUNDED))
def test_eight_bits_round_as_much_as_they_do_on_a_cpu(build, engine, precision):
    capability = nvidia.compute_capability(0)
    if precision == "fp8" and int(capability.removeprefix("sm_")) < 89:
        pytest.skip(f"fp8 needs sm_89, and this GPU is {capability}")
    targets = ["--target", capability] if precision == "fp8" and engine == "tensorrt-rtx" else []
    folder, plan = build("--precision", precision, *targets)
    assert plan["precision"] == precision
    away = difference(predicted(folder, engine), predicted(folder, "onnxruntime-cpu"))
    assert away < ROUNDED[precision] + TOLERANCES[engine]


def test_a_stripped_plan_holds_no_weights(build):
    """Of a full-size UNet it is a few MB; of this one, what the weights take is missing."""
    folder, whole = build()
    _, stripped = build("--stripped")
    weights = sum(file.stat().st_size for file in (folder / "unet").glob("*.onnx_data"))
    assert weights > 1e6
    assert whole["bytes"] - stripped["bytes"] > 0.8 * weights


def test_a_lora_put_into_a_stripped_plan_and_taken_off_again(build, engine, tmp_path):
    """Every weight is put in three times: the bundle's, the LoRA's, the bundle's. A defect elsewhere: NVIDIA/TensorRT#3628."""
    folder, _ = build("--stripped", "--refit")
    loras = [(lora_for(folder, tmp_path / "lora.safetensors"), 1.0)]
    before, changed, after = (latents(folder, engine, **more) for more in ({}, {"loras": loras}, {}))
    assert difference(changed, latents(folder, "onnxruntime-cpu", loras=loras)) < TOLERANCES[engine]
    assert difference(changed, before) > 10 * TOLERANCES[engine]
    np.testing.assert_array_equal(after, before)


def test_the_second_start_compiles_nothing(build, engine, tmp_path, monkeypatch, caplog):
    """Kernels are kept when they were first compiled; another start that took them as they are has none to add."""
    if engine != "tensorrt-rtx":
        pytest.skip("TensorRT compiles when it builds")
    folder, _ = build()
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path / "home"))
    caplog.set_level(logging.INFO)
    first = latents(folder, engine)
    kept = {path: path.stat().st_size for path in (tmp_path / "home").rglob("*.rtxcache")}
    assert len(kept) >= 3 and all(kept.values())  # text, UNet, decoder
    np.testing.assert_array_equal(latents(folder, engine), first)
    assert {path: path.stat().st_size for path in (tmp_path / "home").rglob("*.rtxcache")} == kept
    assert "it is made anew" not in caplog.text
