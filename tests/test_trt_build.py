"""Engines built: for which shapes, for which GPUs, what a failure says; and real builds by TensorRT-RTX, which need no GPU."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vega_edge import engines
from vega_edge.bench.lora import random_lora
from vega_edge.bundle import Bundle
from vega_edge.cli import main
from vega_edge.engines import LazyWeights, nvidia
from vega_edge.engines.plan_choice import Here, choose_plans
from vega_edge.engines.plan_store import Plan, PlanLora, PlanStore, graph_hash
from vega_edge.errors import EngineError, ExportError, UsageError
from vega_edge.export import trt_build, trt_child, trt_library, trt_network
from vega_edge.export.trt_build import BuildOptions, BuiltEngine, build_engines, graphs
from vega_edge.export.trt_calibrate import Measured
from vega_edge.export.trt_child import build_apart
from vega_edge.export.trt_graph import int8_scale, prepared
from vega_edge.export.trt_library import Library, check_targets, load_library
from vega_edge.export.trt_network import Job, build_plan, build_to, read_inputs, share
from vega_edge.export.trt_profiles import (
    Range,
    Sizes,
    batch_range,
    bundle_sizes,
    check_inputs,
    check_multiple,
    profile,
    size_range,
)
from vega_edge.export.trt_ranges import kept_ranges
from vega_edge.manifest import MANIFEST
from vega_edge.models import recipes
from vega_edge.onnx_file import read_weights
from vega_edge.runtime import parts
from vega_edge.runtime.calibration import draw_with
from vega_edge.runtime.parts import weights_of
from vega_edge.runtime.patches import Patches
from vega_edge.tiling import TILING
from vega_edge.verbs import build

from .fake_tensorrt import FakeTensorRT
from .full import IN_FULL

pytest.importorskip("filelock")
F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


def refused(exception, call, *args, **kwargs):
    with pytest.raises(exception) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def graph(tmp_path):
    """y = x @ w, x [batch, 16, 128], w [128, 128]."""
    return matmul(tmp_path / "unet" / "model.onnx", np.float32)


def matmul(path, dtype, side=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    w = np.random.default_rng(0).standard_normal((side, side)).astype(dtype)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="the_product")]
    tensors = [helper.make_tensor_value_info(name, kind, ["batch", 16, side]) for name in "xy"]
    made = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    return path


# shapes

SIZES = Sizes(Range(512, 1024, 1536), Range(512, 768, 1024), Range(1, 1, 4))
UNET = {
    "sample": (-1, 4, -1, -1), "timestep": (1,), "encoder_hidden_states": (-1, -1, 2048), "text_embeds": (-1, 1280),
    "time_ids": (-1, 6),
}  # fmt: skip


def test_the_unets_shapes():
    assert profile("unet", UNET, SIZES, 8) == {
        "sample": ((1, 4, 64, 64), (1, 4, 96, 128), (8, 4, 128, 192)),
        "encoder_hidden_states": ((1, 77, 2048), (1, 77, 2048), (8, 231, 2048)),
        "text_embeds": ((1, 1280), (1, 1280), (8, 1280)),
        "time_ids": ((1, 6), (1, 6), (8, 6)),
    }


def test_a_static_engine_has_one_shape():
    guided = dataclasses.replace(SIZES, guided=Range(1, 2, 2)).static()
    ranges = profile("unet", UNET, guided, 8)
    assert ranges["sample"] == ((2, 4, 96, 128),) * 3
    assert ranges["encoder_hidden_states"] == ((2, 77, 2048),) * 3


def test_other_parts_shapes():
    assert profile("vae_decoder", {"latent_sample": (-1, 4, -1, -1)}, SIZES, 8) == {
        "latent_sample": ((1, 4, 64, 64), (1, 4, 96, 128), (4, 4, 128, 192))
    }
    assert profile("vae_encoder", {"sample": (-1, 3, -1, -1)}, SIZES, 8) == {
        "sample": ((1, 3, 512, 512), (1, 3, 768, 1024), (4, 3, 1024, 1536))
    }
    assert profile("text_encoder", {"input_ids": (-1, 77)}, SIZES, 8) == {"input_ids": ((1, 77), (1, 77), (6, 77))}
    assert profile("text_encoder", {"input_ids": (-1, 77)}, SIZES.static(), 8) == {"input_ids": ((1, 77),) * 3}


@pytest.mark.parametrize(
    ("sizes", "sides"),
    [
        ((Range(512, 1024, 1536), Range(512, 768, 1024)), ((64, 64), (96, 128), (128, 160))),
        ((Range(512, 512, 768), Range(512, 512, 768)), ((64, 64), (64, 64), (96, 96))),  # never a tile
        ((Range(1024, 1024, 1024),) * 2, ((64, 64), (128, 128), (128, 128))),  # static: tiles with little memory
        ((Range(384, 384, 384), Range(1024, 1024, 1024)), ((64, 48), (128, 48), (128, 48))),
        ((Range(1024, 1536, 2048),) * 2, ((64, 64), (64, 64), (160, 160))),
        ((Range(1536, 1536, 1536),) * 2, ((64, 64), (64, 64), (64, 64))),  # always tiles
    ],
)
def test_a_decoder_gets_tiles_and_no_picture_that_is_tiled(sizes, sides):
    inputs, tiled = {"latent_sample": (-1, 4, -1, -1)}, Sizes(*sizes, Range(2, 2, 4), tiling=TILING)
    for part in ("vae_decoder", "tiny_vae_decoder"):
        got = profile(part, inputs, tiled, 8)["latent_sample"]
        assert tuple(shape[2:] for shape in got) == sides
        assert [shape[0] for shape in got] == [1, 2, 4]  # a tile at a time
    assert profile("unet", {"sample": (-1, 4, -1, -1)}, tiled, 8)["sample"][2][2:] == (
        sizes[1].most // 8,
        sizes[0].most // 8,
    )


def test_a_bundles_decoder_takes_the_runtimes_tiles():
    sdxl = SimpleNamespace(manifest=None, number=lambda part, key: 128, levels=lambda part: 4)
    sizes = bundle_sizes(sdxl)
    assert sizes.tiling == TILING
    assert profile("vae_decoder", {"latent_sample": (-1, 4, -1, -1)}, sizes, 8)["latent_sample"][0] == (1, 4, 64, 64)
    assert profile("unet", {"sample": (-1, 4, -1, -1)}, sizes, 8)["sample"][0] == (1, 4, 128, 128)


def test_a_foreign_timestep_with_a_free_axis_is_one_number():
    assert profile("unet", {"timestep": (-1,)}, SIZES, 8) == {"timestep": ((1,), (1,), (1,))}


@pytest.mark.parametrize(
    ("text", "width", "height"),
    [
        ("512", (512, 512, 512), (512, 512, 512)),
        ("512:768:1024", (512, 768, 1024), (512, 768, 1024)),
        ("512x384:768x512:1024X1024", (512, 768, 1024), (384, 512, 1024)),
    ],
)
def test_sizes(text, width, height):
    assert size_range(text) == (width, height)


@pytest.mark.parametrize(
    ("call", "text", "message"),
    [
        (size_range, "512:1024", "a size must be MIN:BEST:MAX or one size, in px such as 512:768:1024 or 768x512, not '512:1024'"),
        (size_range, "big", "a size must be in px, such as 512, 768x512 or 512:768:1024, not 'big'"),
        (size_range, "9" * 5000, f"a size must be in px, such as 512, 768x512 or 512:768:1024, not '{'9' * 5000}'"),
        (size_range, "512x", "a size must be in px, such as 512, 768x512 or 512:768:1024, not '512x'"),
        (size_range, "1024:512:1024", "a size's MIN:BEST:MAX must not fall, as in 1:1:4, but '1024:512:1024' does"),
        (batch_range, "0", "a batch must be MIN:BEST:MAX or one number, from 1 on, such as 1:1:4, not '0'"),
        (batch_range, "99999999999", "a batch must be of 64 pictures at most, not '99999999999'"),
        (batch_range, "1:1:65", "a batch must be of 64 pictures at most, not '1:1:65'"),
        (batch_range, "4:1:1", "a batch's MIN:BEST:MAX must not fall, as in 1:1:4, but '4:1:1' does"),
        (lambda text: check_multiple(Sizes(*size_range(text), Range(1, 1, 1)), 64), "100", "a side must be a multiple of 64 px for this model, not 100"),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(call, text, message):
    assert refused(UsageError, call, text) == message


def test_a_batch():
    assert batch_range("2") == (2, 2, 2)
    assert batch_range("1:2:4") == (1, 2, 4)


# progress


@pytest.mark.parametrize(
    ("phases", "done"),
    [([], 0), ([[0, 4]], 0), ([[1, 4]], 0.25), ([[1, 4], [5, 10]], 0.375), ([[1, 2], [1, 2], [1, 2]], 0.875), ([[4, 4], [1, 2]], 1)],
)  # fmt: skip
def test_share_of_phases_within_phases(phases, done):
    assert share(phases) == done


def test_progress_never_goes_back(graph):
    seen = []
    fake = FakeTensorRT(steps=((0, 2), (1, 2), (0, 2)))
    build_plan(Job(Library("tensorrt", fake), graph), lambda done, phase: seen.append((done, phase)))
    assert seen == [(0.5, "Building engine"), (1, "Building engine"), (1, "Building engine")]


# a process for each plan


@pytest.fixture
def silent(tmp_path, monkeypatch):
    """A Job for a library that the child finds as tensorrt_rtx: `silent(CODE)` runs CODE where it builds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def job(code):
        fake_library(tmp_path, code)
        graph = matmul(tmp_path / "unet" / "model.onnx", np.float32)
        return Job(Library("tensorrt-rtx", FakeTensorRT()), graph, targets=("ampere+",))

    return job


def fake_library(folder, code):
    """tensorrt_rtx in `folder`: where it builds it runs CODE, and writes its process's number to `pid`."""
    shutil.copy(Path(__file__).with_name("fake_tensorrt.py"), folder)
    (folder / "tensorrt_rtx.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\nimport fake_tensorrt\n"
        f"inputs = {UNET}\n"
        f"def build(*args):\n    Path({str(folder / 'pid')!r}).write_text(str(os.getpid()))\n    {code}\n"
        "fake_tensorrt.Builder.build_serialized_network = build\nmade = fake_tensorrt.FakeTensorRT(inputs=inputs)\n"
        "made.ComputeCapability = type('C', (), {'__members__': {'SM86': 86}})\nsys.modules[__name__] = made\n"
    )


def until(true, seconds=20):
    for _ in range(seconds * 20):
        if true():
            return True
        time.sleep(0.05)
    return False


def runs(pid):
    return Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the process in /proc")
def test_ctrl_c_ends_a_build_that_calls_nobody_back(silent, tmp_path, capfd):
    job, told = silent("time.sleep(60)"), []

    def progress(share, phase):
        told.append((share, phase))
        if (tmp_path / "pid").is_file() and len(told) > 3:
            _thread.interrupt_main()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_apart(job, tmp_path / "plan", progress)
    assert time.monotonic() - start < 30  # not the 60 that the library takes
    assert set(told) == {(0, "starting")}  # told again and again, so that a bar's time goes on
    assert not runs((tmp_path / "pid").read_text())
    assert not (tmp_path / "plan").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the process in /proc")
def test_a_build_ends_with_who_asked_for_it_though_it_was_killed(silent, tmp_path):
    job = silent("time.sleep(60)")
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
        "from vega_edge.export.trt_child import build_apart\nfrom vega_edge.export.trt_network import Job\n"
        "from vega_edge.export.trt_library import load_library\n"
        f"job = Job(load_library('tensorrt-rtx'), Path({str(job.graph)!r}), targets=('ampere+',))\n"
        f"build_apart(job, Path({str(tmp_path / 'plan')!r}), lambda *args: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    assert runs((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    assert until(lambda: not runs((tmp_path / "pid").read_text()))


@pytest.fixture
def building(tmp_path, recipe_copy):
    """`vega-edge build` for int8, at work with its copies of the weights in a hidden folder."""
    fake_library(tmp_path, "time.sleep(60)")
    code = (
        f"import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}\nfrom vega_edge.cli import main\n"
        f"sys.exit(main(['build', {str(recipe_copy)!r}, '--engine', 'tensorrt-rtx', '--part', 'unet', '--precision', 'int8']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert until(lambda: (tmp_path / "pid").is_file(), 60)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def recipe_copy(tmp_path):
    return Path(shutil.copytree(recipes()["demo-vegart"].bundle_path, tmp_path / "demo"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_told_to_end_leaves_nothing(building, recipe_copy, which):
    folder = PlanStore(recipe_copy).folder
    assert list(folder.glob(".build-*/*/unet/quantized_data"))
    building.send_signal(which)
    assert (building.communicate(timeout=20)[1], building.returncode) == ("vega-edge: interrupted\n", 130)
    assert not list(folder.glob(".build-*"))


def test_a_killed_builds_copies_are_cleaned_up_at_once(building, recipe_copy, capsys):
    assert main(["engines", "gc", str(recipe_copy)]) == 0
    assert capsys.readouterr().out == ""
    building.kill()
    building.wait()
    assert main(["engines", "gc", str(recipe_copy)]) == 0
    assert re.fullmatch(r"\.build-[0-9a-f]{32}-\w+\n", capsys.readouterr().out)


def test_the_childs_plan_progress_and_words_are_the_callers(silent, tmp_path, caplog, capfd):
    caplog.set_level("INFO", trt_child.__name__)
    job = silent(
        "m = args[2].progress_monitor; m.phase_start('Tuning', None, 4); m.step_complete('Tuning', 0)\n"
        "    args[0].logger.log(3, 'a word'); print('noise'); return b'plan'"
    )
    told = []
    assert build_apart(job, tmp_path / "plan", lambda *each: told.append(each)) == b""
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert capfd.readouterr() == ("", "")
    assert (0.25, "Tuning") in told
    assert "unet/model.onnx: a word" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("args[0].logger.log(1, 'OutOfMemory'); return None", "unet/model.onnx: tensorrt-rtx can't build it: OutOfMemory; too little memory: lower MIN:BEST:MAX of --size and --batch, build one --part at a time, or close other programs"),
        ("os.kill(os.getpid(), 9)", "unet/model.onnx: the process that builds it ended with status -9, as it does where memory runs out; too little memory: lower MIN:BEST:MAX of --size and --batch, build one --part at a time, or close other programs"),
    ],
)  # fmt: skip
def test_the_childs_errors_are_the_callers(silent, tmp_path, code, message):
    if sys.platform == "win32" and "kill" in code:
        pytest.skip("the status is another there")
    assert refused(EngineError, build_apart, silent(code), tmp_path / "plan", lambda *args: None) == message


def test_a_defect_in_the_child_keeps_its_traceback(silent, tmp_path, capfd):
    message = refused(
        EngineError, build_apart, silent("raise KeyError('a defect')"), tmp_path / "plan", lambda *_: None
    )
    assert message == "unet/model.onnx: the process that builds it failed, as is said above"
    assert capfd.readouterr().err.endswith("KeyError: 'a defect'\n")


def test_a_plan_that_can_not_be_written(graph, tmp_path):
    message = refused(EngineError, build_to, Job(Library("tensorrt", FakeTensorRT()), graph), tmp_path / "no" / "plan")
    assert message == f"{tmp_path / 'no' / 'plan'} can't be written (No such file or directory); free some space there"


# what the library is told


def test_tensorrt_before_11_is_asked_for_a_strongly_typed_network(graph):
    for typed, flags in ((True, 2), (False, 0)):
        fake = FakeTensorRT(typed=typed)
        build_plan(Job(Library("tensorrt", fake), graph))
        assert fake.told["network"] == flags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), []), (("refit",), ["REFIT"]), (("stripped", "static"), ["REFIT_IDENTICAL", "STRIP_PLAN"]),
        (("refit", "stripped"), ["REFIT", "STRIP_PLAN"]), (("weight-streaming",), ["WEIGHT_STREAMING"]),
    ],
)  # fmt: skip
def test_flags(graph, flags, told):
    fake = FakeTensorRT()
    build_plan(Job(Library("tensorrt", fake), graph, flags=flags))
    assert fake.told["flags"] == told
    assert fake.told["preview"] == ("RESIZE", True)


@pytest.mark.parametrize(
    ("flags", "told"), [((), ["REQUIRE_USER_ALLOCATION"]), (("weight-streaming",), ["WEIGHT_STREAMING"])]
)
def test_tensorrt_rtx_is_told_that_its_plans_are_captured(graph, flags, told):
    fake = FakeTensorRT()
    fake.BuilderFlag.REQUIRE_USER_ALLOCATION = "REQUIRE_USER_ALLOCATION"
    build_plan(Job(Library("tensorrt-rtx", fake), graph, flags=flags))
    assert fake.told["flags"] == told


def test_tensorrt_tries_kernels_in_half_of_the_memory_that_is_free(graph, monkeypatch):
    fake = FakeTensorRT()
    build_plan(Job(Library("tensorrt", fake), graph))
    assert "limit" not in fake.told
    monkeypatch.setattr(trt_build, "free_bytes", lambda gpu: 6_000_000_000)
    store, wanted = (
        PlanStore(graph.parent.parent),
        Plan("", "", 0, "unet/model.onnx", "", "tensorrt", "10.3.0", ("sm_87",), {}),
    )
    build_plan(trt_build._job(store, wanted, Library("tensorrt", fake), graph, 0))
    assert fake.told["limit"] == ("WORKSPACE", 3_000_000_000)
    assert trt_build._job(store, wanted, RTX, graph, 0).workspace_bytes == 0


def test_older_libraries_lack_a_flag_and_a_feature(graph):
    fake = FakeTensorRT()
    del fake.BuilderFlag.REFIT_IDENTICAL, fake.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10
    build_plan(Job(Library("tensorrt", fake), graph, flags=("stripped",)))
    assert fake.told["flags"] == ["REFIT", "STRIP_PLAN"]
    assert "preview" not in fake.told


def test_profiles_and_timings_are_handed_over(graph):
    fake = FakeTensorRT()
    ranges = {"x": ((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))}
    built = build_plan(Job(Library("tensorrt", fake), graph, ranges, timing_cache=b"known"))
    assert fake.told["shapes"] == ranges
    assert (fake.told["timing cache"], built.timing_cache, bytes(built.content)) == (b"known", b"known+", b"plan")


def test_timings_of_another_gpu_are_measured_anew(graph):
    fake = FakeTensorRT()
    fake.foreign_timings = b"other"
    built = build_plan(Job(Library("tensorrt", fake), graph, {}, timing_cache=b"other"))
    assert built.timing_cache == b"+"


def test_a_profile_that_the_library_refuses_is_named(graph):
    fake = FakeTensorRT()
    fake.profile_index = -1
    job = Job(Library("tensorrt", fake), graph, {"x": ((1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8))})
    assert "refuses the shapes x (1, 4, 8, 8) to (2, 4, 8, 8)" in refused(EngineError, build_plan, job)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 99)", "too little memory: lower MIN:BEST:MAX of --size and --batch, build one --part at a time, or close other programs"),
        ("Myelin: FP32 GEMM is not supported.", "sm_75 has no fp32 matrix product in TensorRT-RTX: export the bundle with --dtype fp16"),
        ("MyelinCheckException: CHECK(status == CUDA_SUCCESS) failed.", "this kind of build needs a GPU with a new enough driver: see vega-edge doctor, or build without --refit and --stripped"),
        ("something else", "see -v for all that the library said"),
    ],
)  # fmt: skip
def test_a_failed_build_names_the_cure(graph, error, cure):
    fake = FakeTensorRT(plan=None, errors=["first", error])
    message = refused(EngineError, build_plan, Job(Library("tensorrt", fake), graph))
    assert message == f"unet/model.onnx: tensorrt can't build it: {error}; {cure}"


def test_an_operator_that_is_not_supported_names_the_node(graph):
    fake = FakeTensorRT(parse=("node_Foo_7", "Foo", "no importer\nfor it"))
    assert refused(EngineError, build_plan, Job(Library("tensorrt", fake), graph)) == (
        "unet/model.onnx: its node 'node_Foo_7' (Foo) is not supported (no importer for it); "
        "export the bundle with this version's vega-edge export"
    )


def test_a_node_without_a_name_is_told_by_its_number(graph):
    fake = FakeTensorRT(parse=("", "Foo", "no importer"))
    assert refused(EngineError, build_plan, Job(Library("tensorrt", fake), graph)) == (
        "unet/model.onnx: its node number 7, which has no name, (Foo) is not supported (no importer); "
        "export the bundle with this version's vega-edge export"
    )


@pytest.mark.parametrize(
    ("part", "inputs", "message"),
    [
        ("text_encoder", {"x": (-1, 4)}, "is not the graph of a text_encoder: it lacks an input input_ids with 2 axes, and has x with 2 axes"),
        ("vae_decoder", {"sample": (1, 4, 8, 8)}, "is not the graph of a vae_decoder: it lacks an input latent_sample with 4 axes, and has sample with 4 axes"),
        ("unet", {**UNET, "sample": (1, 2)}, "is not the graph of a unet: it lacks an input sample with 4 axes, and has sample with 2 axes, timestep with 1 axes, encoder_hidden_states with 3 axes, text_embeds with 2 axes, time_ids with 2 axes"),
    ],
)  # fmt: skip
def test_a_graph_that_is_not_of_its_part(part, inputs, message):
    told = refused(EngineError, check_inputs, f"{part}/model.onnx", part, inputs)
    assert told == f"{part}/model.onnx {message}; export the bundle again"


def test_graphs_of_their_parts_pass():
    check_inputs("", "unet", UNET)
    check_inputs("", "unet", {**UNET, "timestep": ()})
    check_inputs("", "safety_checker", {"x": ()})


# libraries and targets


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    def fail(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(trt_library, "import_module", fail)
    assert refused(EngineError, load_library, "tensorrt-rtx") == (
        'tensorrt-rtx is not installed here; pip install "vega-edge[tensorrt-rtx]"'
    )
    monkeypatch.setattr(nvidia, "JETSON", tmp_path / "none")
    assert refused(EngineError, load_library, "tensorrt") == (
        'tensorrt is not installed here; pip install tensorrt "vega-edge[tensorrt]"'
    )
    (tmp_path / "release").touch()
    monkeypatch.setattr(nvidia, "JETSON", tmp_path / "release")
    assert refused(EngineError, load_library, "tensorrt") == (
        'tensorrt is not installed here; pip install "vega-edge[jetson]" into a venv made with --system-site-packages, '
        "which sees JetPack's tensorrt"
    )
    assert refused(UsageError, load_library, "openvino") == (
        "unknown engine to build 'openvino'; there are: tensorrt, tensorrt-rtx"
    )


class Capability:
    __members__ = {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM86": 86, "SM89": 89, "SM120": 120}  # noqa: RUF012


RTX = Library("tensorrt-rtx", type("M", (), {"ComputeCapability": Capability, "__version__": "1.7"}))


@pytest.mark.parametrize(
    ("targets", "precision", "got"),
    [
        ((), "graph", ("ampere+",)),
        (("sm_75",), "graph", ("sm_75",)),
        (("sm_86", "sm_89"), "int8", ("sm_86", "sm_89")),
        (("sm_89", "sm_120"), "fp8", ("sm_89", "sm_120")),
        (("sm_89", "sm_86", "sm_89"), "graph", ("sm_86", "sm_89")),  # one engine, in whatever order they are named
        (("ampere+", "ampere+"), "graph", ("ampere+",)),
    ],
)
def test_targets(targets, precision, got):
    assert check_targets(RTX, targets, precision) == got


@pytest.mark.parametrize(
    ("targets", "precision", "message"),
    [
        (("sm_90",), "graph", "unknown target 'sm_90'; did you mean 'sm_89'? there are: ampere+, sm_120, sm_75, sm_86, sm_89"),
        (("sm_75", "sm_86"), "graph", "ampere+ and sm_75 are each an engine of its own, not to be mixed with others: build one after the other"),
        ((), "fp8", "fp8 needs sm_89, sm_120; ampere+ has none: name targets, or use int8"),
        (("sm_86", "sm_89"), "fp8", "fp8 needs sm_89, sm_120; sm_86 has none: name targets, or use int8"),
        (("sm_75",), "int8", "tensorrt-rtx has no int8 for sm_75 (Turing): build without --precision"),
        ((), "int4", "unknown precision 'int4'; did you mean 'int8'? there are: fp8, graph, int8"),
    ],
)  # fmt: skip
def test_targets_that_are_refused(targets, precision, message):
    assert refused(UsageError, check_targets, RTX, targets, precision) == message


def test_tensorrt_builds_for_the_gpu_here(monkeypatch):
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: ["sm_87", "sm_89"][index])
    library = Library("tensorrt", FakeTensorRT())
    assert check_targets(library, (), "graph") == ("sm_87",)
    assert check_targets(library, (), "graph", gpu=1) == ("sm_89",)
    assert refused(UsageError, check_targets, library, ("sm_89",), "graph") == (
        "tensorrt builds for the GPU it runs on, sm_87, not for sm_89"
    )


@pytest.mark.parametrize("capability", ["sm_89", "sm_90", "sm_103", "sm_121"])
def test_tensorrt_has_fp8_from_ada_on(monkeypatch, capability):
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: capability)
    assert check_targets(Library("tensorrt", FakeTensorRT()), (), "fp8") == (capability,)


def test_tensorrt_has_no_fp8_before_ada(monkeypatch):
    """No target can be named for it: it builds for the GPU here."""
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: "sm_87")
    assert refused(UsageError, check_targets, Library("tensorrt", FakeTensorRT()), (), "fp8") == (
        "fp8 needs sm_89 or later, and this GPU is sm_87; use int8"
    )


def test_the_gpu_is_chosen_before_it_builds(monkeypatch, graph):
    chosen = []
    monkeypatch.setattr(trt_network, "select", chosen.append)
    for gpu in (0, 2):
        build_plan(Job(Library("tensorrt", FakeTensorRT()), graph, gpu=gpu))
    assert chosen == [2]


def test_a_version_that_draws_wrong_pictures_is_refused():
    def check(version, flags):
        library = Library("tensorrt", SimpleNamespace(__version__=version))
        trt_build._check_flags(library, BuildOptions("tensorrt", SIZES, flags=flags))

    assert refused(EngineError, check, "11.3.0.10", ("refit", "stripped")).startswith(
        "tensorrt 11.3.0.10 draws wrong pictures with engines built with --refit (a known issue of 11.3): install another"
    )
    check("11.4.0", ("refit",))
    check("11.3.0.10", ("stripped",))  # REFIT_IDENTICAL, which NVIDIA says is right


def test_refitting_needs_a_gpu_to_build_on(monkeypatch, tmp_path):
    def none():
        raise EngineError("the NVIDIA driver shows no GPU")

    monkeypatch.setattr(nvidia, "devices", none)
    options = BuildOptions("tensorrt-rtx", SIZES, flags=("stripped",))
    assert refused(EngineError, trt_build._check_flags, RTX, options) == (
        "--stripped with tensorrt-rtx needs a GPU to build on, and the NVIDIA driver shows no GPU; build without it: for "
        "a LoRA, build with --lora, which takes as long"
    )


def test_the_gpu_to_refit_on_must_be_there(monkeypatch):
    monkeypatch.setattr(nvidia, "devices", lambda: ["RTX 4090"])
    message = refused(
        EngineError, trt_build._check_flags, RTX, BuildOptions("tensorrt-rtx", SIZES, flags=("refit",), gpu=7)
    )
    assert message.startswith(
        "--refit with tensorrt-rtx needs a GPU to build on, and there is no cuda:7; the GPUs are: "
    )


# the graph that is built from


def test_the_bundles_own_graph_is_not_copied(graph, tmp_path):
    with prepared(graph, {}, "graph", tmp_path / "work") as path:
        assert path == graph
    assert not (tmp_path / "work").exists()


def test_replaced_weights_are_those_of_the_copy(graph, tmp_path):
    new = np.random.default_rng(1).standard_normal((128, 128)).astype(np.float32)
    x = np.ones((2, 16, 128), np.float32)
    before = (graph.parent / "model.onnx_data").read_bytes()
    with prepared(graph, {"w": new}, "graph", tmp_path / "work") as path:
        np.testing.assert_array_equal(read_weights(path)["w"].read(), new)
        got = engines.open_engine(path, "onnxruntime-cpu").run({"x": x})["y"]
    want = engines.open_engine(graph, "onnxruntime-cpu", weights={"w": new}).run({"x": x})["y"]
    np.testing.assert_array_equal(got, want)
    assert (graph.parent / "model.onnx_data").read_bytes() == before
    assert not list((tmp_path / "work").iterdir())


def test_int8_weights_stay_near_and_are_a_quarter(graph, tmp_path):
    x = np.random.default_rng(2).standard_normal((2, 16, 128)).astype(np.float32)
    want = engines.open_engine(graph, "onnxruntime-cpu").run({"x": x})["y"]
    with prepared(graph, {}, "int8", tmp_path) as path:
        got = engines.open_engine(path, "onnxruntime-cpu").run({"x": x})["y"]
        size = (path.parent / "quantized_data").stat().st_size
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.02  # 127 steps for each column: a uniform error of half a step, over normal weights
    assert size < 0.3 * 128 * 128 * 4


def test_an_int8_column_of_zeros_has_a_scale():
    scale = int8_scale(np.float16([[0, 127], [0, -254]]))
    assert (scale.tolist(), scale.dtype) == ([1, 2], np.float16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_int8_column_of_tiny_values_has_a_scale_that_is_not_zero(dtype):
    """Its 127th part is less than half precision can hold."""
    column = np.array([[1e-6], [-3e-6]], dtype)
    scale = int8_scale(column)
    assert scale.dtype == dtype and scale[0] >= 5.9e-8
    assert np.isfinite(column / scale).all() and np.abs(column / scale).max() <= 127


def test_fp8_is_of_both_sides(graph, tmp_path):
    with prepared(graph, {}, "fp8", tmp_path, {"x": 4.0}) as path:
        model = onnx.load(path)
    assert [node.op_type for node in model.graph.node] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"
    ]  # fmt: skip
    assert model.opset_import[0].version == 19
    scales = {t.name: float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name.endswith("scale")}
    largest = float(np.abs(read_weights(graph)["w"].read()).max())
    assert sorted(scales.values()) == pytest.approx(sorted([4 / 448, largest / 448]))


def test_an_fp8_graph_stays_near(graph, tmp_path):
    """E4M3 has 3 bits of mantissa: a rounding of up to 2^-4 on each side, which a sum of 128 products averages."""
    x = np.random.default_rng(2).standard_normal((2, 16, 128)).astype(np.float32)
    want = engines.open_engine(graph, "onnxruntime-cpu").run({"x": x})["y"]
    with prepared(graph, {}, "fp8", tmp_path, largest_values(graph, [{"x": x}])) as path:
        options = onnxruntime.SessionOptions()  # onnxruntime's fusions take every 8-bit type for an integer
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        (got,) = onnxruntime.InferenceSession(path, options).run(None, {"x": x})
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 5e-3 < error < 0.05


@pytest.fixture
def half_stored(tmp_path):
    """y = x @ float32(w), w float16 [128, 128]: full arithmetic over half storage."""
    path = matmul(tmp_path / "half" / "model.onnx", np.float32)
    model = onnx.load(path)
    w = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))
    model.graph.node.insert(0, helper.make_node("Cast", ["w"], ["w.cast"], to=F32))
    model.graph.node[1].input[1] = "w.cast"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_half_storage_and_full_arithmetic_are_quantized_too(half_stored, tmp_path, precision):
    x = np.random.default_rng(2).standard_normal((2, 16, 128)).astype(np.float32)
    want = engines.open_engine(half_stored, "onnxruntime-cpu").run({"x": x})["y"]
    ranges = largest_values(half_stored, [{"x": x}])
    assert ranges == {"x": float(np.abs(x).max())}
    with prepared(half_stored, {}, precision, tmp_path, ranges) as path:
        model = onnx.load(path)
        kinds = [node.op_type for node in model.graph.node]
        assert "Cast" not in kinds and kinds[-2:] == ["DequantizeLinear", "MatMul"]
        scales = {t.data_type for t in model.graph.initializer if t.name.endswith("scale")}
        assert scales == {F32}
        options = onnxruntime.SessionOptions()  # onnxruntime's fusions take every 8-bit type for an integer
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        (got,) = onnxruntime.InferenceSession(path, options).run(None, {"x": x})
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def test_a_cast_that_others_use_too_stays(half_stored, tmp_path):
    model = onnx.load(half_stored)
    model.graph.node.append(helper.make_node("MatMul", ["y", "w.cast"], ["z"]))
    model.graph.output[0].name = "z"
    onnx.save(model, half_stored)
    with pytest.raises(ExportError) as caught, prepared(half_stored, {}, "int8", tmp_path):
        pass
    assert str(caught.value) == "half/model.onnx has no matrix product that int8 could be used for"


def largest_values(graph, feeds):
    measured = Measured(graph)
    for given in feeds:
        assert list(measured.run(given)) == list(measured.outputs)
    return measured.largest()


def test_calibration_takes_the_largest_of_all_inputs(graph):
    feeds = [{"x": np.full((1, 16, 128), value, np.float32)} for value in (1, -5, 3)]
    assert largest_values(graph, feeds) == {"x": 5}


def test_a_plan_of_an_earlier_revision_is_built_again(graph, monkeypatch):
    bundle = SimpleNamespace(
        path=graph.parent.parent, parts=("unet",), has=lambda file: file == "unet/model.onnx",
        file=lambda file: graph.parent.parent / file, levels=lambda part: 4, manifest=SimpleNamespace(dtype="fp16"),
    )  # fmt: skip
    monkeypatch.setattr(trt_build, "load_library", lambda name: Library("tensorrt-rtx", FakeTensorRT(inputs=UNET)))
    monkeypatch.setattr(trt_build, "check_targets", lambda *args: ("ampere+",))
    monkeypatch.setattr(trt_build, "build_apart", build_to)  # here, where the fake is
    monkeypatch.setattr(trt_network, "set_targets", lambda *args: None)
    options, store = BuildOptions("tensorrt-rtx", SIZES), PlanStore(bundle.path)

    def build():
        (engine,) = build_engines(bundle, options)
        return engine.seconds > 0

    assert (build(), build()) == (True, False)
    monkeypatch.setattr(trt_build, "REVISION", trt_build.REVISION + 1)
    assert (build(), build(), len(store.plans())) == (True, False, 1)


def test_replaced_weights_are_not_kept_for_the_time_of_a_build(graph, tmp_path):
    (name, weight), kept = next(iter(read_weights(graph).items())), []

    def make():
        values = np.zeros(weight.shape, np.float32)
        kept.append(weakref.ref(values))
        return {name: values}

    with prepared(graph, LazyWeights(make), "graph", tmp_path):
        gc.collect()
        assert len(kept) == 1 and kept[0]() is None


def test_fp8_is_calibrated_with_the_loras_weights(graph, monkeypatch):
    """What the LoRA makes larger would be cut off at the scale that was measured without it."""
    new = np.random.default_rng(1).standard_normal((128, 128)).astype(np.float32)
    bundle = SimpleNamespace(
        path=graph.parent.parent, parts=("unet",), has=lambda file: file == "unet/model.onnx",
        file=lambda file: graph.parent.parent / file, levels=lambda part: 4, manifest=SimpleNamespace(dtype="fp16"),
    )  # fmt: skip
    monkeypatch.setattr(trt_build, "load_library", lambda name: Library("tensorrt", FakeTensorRT(inputs=UNET)))
    monkeypatch.setattr(trt_build, "build_apart", build_to)  # here, where the fake is
    monkeypatch.setattr(trt_build, "free_bytes", lambda gpu: 0)
    monkeypatch.setattr(nvidia, "compute_capability", lambda index: "sm_89")
    measured = []

    def ranges(path):
        measured.append(read_weights(path)["w"].read())
        return {"x": 4.0}

    options = BuildOptions("tensorrt", SIZES, precision="fp8")
    for replaced in ({}, {"w": new}):
        build_engines(
            bundle, options, weights=lambda part, replaced=replaced: replaced, loras=[("ab" * 32, 1.0)], ranges=ranges
        )
    assert len(measured) == 2
    np.testing.assert_array_equal(measured[0], read_weights(graph)["w"].read())
    np.testing.assert_array_equal(measured[1], new)


def test_what_is_built_already_is_told_where_nothing_can_be_written(embedded, built, monkeypatch):
    def refused(self, *args, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    again = build_engines(embedded, BuildOptions("tensorrt-rtx", bundle_sizes(embedded), ("unet",)))
    assert [(each.plan.graph, each.seconds) for each in again] == [("unet/model.onnx", 0.0)]


def test_what_fp8_is_scaled_by_is_measured_once(graph):
    """Another target, or size, takes the same; another graph, or LoRA, does not. A damaged file is measured anew."""
    store, measured = PlanStore(graph.parent.parent), []
    plan = Plan("", "", 0, "unet/model.onnx", graph_hash(graph), "tensorrt-rtx", "1.7", ("sm_89",), {}, precision="fp8")

    def kept(**changes):
        def measure():
            measured.append(changes)
            return {"x": float(len(measured))}

        return kept_ranges(store, dataclasses.replace(plan, **changes), measure)

    assert kept() == kept() == kept(targets=("sm_120",)) == kept(library="tensorrt") == {"x": 1.0}
    assert kept(loras=(PlanLora("ab" * 32, 1.0),)) == {"x": 2.0}
    assert kept(loras=(PlanLora("ab" * 32, 0.5),)) == {"x": 3.0}
    assert kept(graph_hash="0" * 64) == {"x": 4.0}
    assert store.stray() == [next(store.folder.glob("unet.0000000000000000.*.ranges"))]
    first = next(path for path in store.folder.glob("*.ranges") if path.read_text() == '{"x": 1.0}')
    for damage in (b"", b"junk", b"\xff", b"[]", b'{"x": "1"}', b'{"x": NaN}', b'{"x": -1.0}', b'{"x": Infinity}'):
        first.write_bytes(damage)
        again = kept()
        assert again == {"x": float(len(measured))} and kept() == again
    assert len(measured) == 4 + 8


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_calibration_on_what_is_not_finite(graph, value):
    feeds = [{"x": np.full((1, 16, 128), each, np.float32)} for each in (1, value, 2)]
    assert refused(EngineError, largest_values, graph, feeds) == (
        "unet/model.onnx: x is not finite on calibration inputs; fp8 can't be scaled: use int8"
    )


def test_calibration_draws_with_the_measured_unet(monkeypatch):
    """The one that is measured draws: another would be its weights and its work once more."""
    bundle, shares, opened = recipes()["demo-vegart"].bundle_path, [], []
    real = parts.open_engine
    monkeypatch.setattr(
        parts, "open_engine", lambda path, *args, **how: opened.append(path) or real(path, *args, **how)
    )
    measured = Measured(Path(bundle) / "unet" / "model.onnx")
    plain = engines.open_engine(Path(bundle) / "unet" / "model.onnx", "onnxruntime-cpu")
    assert (measured.inputs, measured.outputs) == (plain.inputs, plain.outputs)
    feeds, run = [], measured.run
    monkeypatch.setattr(measured, "run", lambda given: feeds.append(given) or run(given))
    draw_with(measured, bundle, progress=shares.append)
    assert len(feeds) == 3 * 4
    assert opened and not any("unet" in path.parts for path in opened)
    assert all(0 < value < 1e4 for value in measured.largest().values())
    assert shares == pytest.approx([i / 12 for i in range(1, 13)])
    times = [float(given["timestep"][0]) for given in feeds]
    assert times[:4] == sorted(times[:4], reverse=True) == times[4:8]
    assert feeds[0]["sample"].shape == (1, 4, 16, 16)
    assert not np.array_equal(feeds[0]["sample"], feeds[4]["sample"])
    assert not np.array_equal(feeds[0]["encoder_hidden_states"], feeds[4]["encoder_hidden_states"])


# real builds, by TensorRT-RTX, which needs no GPU for them


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "demo"
    shutil.copytree(recipes()["demo-vegart"].bundle_path, folder)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def built(rtx, embedded):
    return build_engines(embedded, BuildOptions("tensorrt-rtx", bundle_sizes(embedded)))


def test_every_graph_of_the_embedded_model_is_built_without_a_gpu(built, embedded):
    assert [each.plan.graph for each in built] == graphs(embedded)
    assert {"text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/pixels.onnx"} <= {e.plan.graph for e in built}
    store = PlanStore(embedded.path)
    for each in built:
        content = store.read(each.plan)
        assert content[:4] == b"vtrt"  # how TensorRT-RTX's plans begin
        assert each.seconds > 0
        assert each.plan.targets == ("ampere+",)
    unet = next(each.plan for each in built if each.plan.graph == "unet/model.onnx")
    assert unet.profile["sample"] == ((1, 4, 8, 8), (1, 4, 16, 16), (8, 4, 32, 32))
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".build-")]


@IN_FULL  # the ordinary tests build those of a Tiny-SD at real width
@pytest.mark.parametrize("name", ["demo-small-sd", "demo-tiny-sd"])  # demo-vega is demo-vegart with other numbers
def test_every_graph_of_the_other_embedded_models_is_built(rtx, name, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("VEGA_EDGE_ENGINES", str(tmp_path))
    bundle = Bundle.open(exported(name, "--weights", "fp16"))
    built = build_engines(bundle, BuildOptions("tensorrt-rtx", bundle_sizes(bundle)))
    parts = [each.plan.graph.split("/")[0] for each in built]
    assert parts == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(bytes(PlanStore(bundle.path).read(each.plan)[:4]) == b"vtrt" for each in built)


def test_what_is_there_is_not_built_again(built, embedded, monkeypatch):
    def never(*args):
        raise AssertionError("built again")

    monkeypatch.setattr(trt_build, "build_apart", never)
    again = build_engines(embedded, BuildOptions("tensorrt-rtx", bundle_sizes(embedded)))
    assert [each.plan for each in again] == [each.plan for each in built]
    assert {each.seconds for each in again} == {0}


def test_an_altered_plan_is_built_again(built, embedded):
    store = PlanStore(embedded.path)
    plan = next(each.plan for each in built if each.plan.graph == "text_encoder/model.onnx")
    (store.folder / plan.file).write_bytes(b"x" * plan.bytes)
    options = BuildOptions("tensorrt-rtx", bundle_sizes(embedded), ("text_encoder",))
    (again,) = build_engines(embedded, options)
    assert again.seconds > 0
    assert store.read(again.plan)[:4] == b"vtrt"


def test_a_lora_is_a_plan_of_its_own(built, embedded):
    """A changed weight of the text encoder; the graph with it is compared on a CPU above."""
    options = BuildOptions("tensorrt-rtx", bundle_sizes(embedded), ("text_encoder",))
    name, place = next(
        (n, p) for n, p in read_weights(embedded.graph("text_encoder")).items() if len(p.shape) == 2 and p.external
    )
    changed = np.fromfile(
        place.file, "f2" if place.dtype == "fp16" else "f4", int(np.prod(place.shape)), offset=place.offset
    )
    changed = (changed.reshape(place.shape) * 2).astype(changed.dtype)
    (with_lora,) = build_engines(embedded, options, weights=lambda part: {name: changed}, loras=[("ab" * 32, 0.5)])
    store = PlanStore(embedded.path)
    key = next(each.plan.key for each in built if each.plan.graph == "text_encoder/model.onnx")
    plain = next(plan for plan in store.plans() if plan.key == key)
    assert with_lora.plan.key != plain.key
    assert with_lora.plan.loras[0].strength == 0.5
    assert {plain.file, with_lora.plan.file} <= {plan.file for plan in store.plans()}
    assert len(store.read(with_lora.plan)) == pytest.approx(len(store.read(plain)), rel=0.1)


def test_build_with_a_lora_on_the_command_line(built, embedded, tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors", reason="the LoRA is written with safetensors (the export extra)")
    file, folder = tmp_path / "style.safetensors", str(embedded.path)
    random_lora(embedded, file, rank=2)
    command = ["build", folder, "--engine", "tensorrt-rtx", "--part", "unet", "--lora", f"{file}:0.5"]
    assert main([*command, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    store = PlanStore(embedded.path)
    plain = next(each.plan for each in built if each.plan.graph == "unet/model.onnx")
    plan = next(plan for plan in store.plans() if plan.file == told["file"])
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (plan.graph, plan.loras, told["built"]) == ("unet/model.onnx", (PlanLora(sha256, 0.5),), True)
    assert store.read(plan)[:4] == b"vtrt"
    here = Here("tensorrt-rtx", plan.version, "sm_89")
    made: list[str] = []
    monkeypatch.setattr(Patches, "of", lambda self, part: made.append(part))
    weights = weights_of(Patches(embedded, [(file, 0.5)]), "unet")
    assert choose_plans(store, embedded.graph("unet"), here, weights)[0].plan == plan
    weaker = weights_of(Patches(embedded, [(file, 0.4)]), "unet")
    assert " LoRA; run: vega-edge build " in refused(
        EngineError, choose_plans, store, embedded.graph("unet"), here, weaker
    )
    assert main(command) == 0
    assert capsys.readouterr().err.endswith("there already\n")
    assert made == []  # what there is was known without them
    assert main([*command[:-1], f"{file}:0", "--json"]) == 0
    (nothing,) = json.loads(capsys.readouterr().out)
    assert (nothing["file"], nothing["loras"]) == (plain.file, [])  # strength 0 is the bundle's own
    assert main(["engines", "ls", folder]) == 0
    assert f"lora {sha256[:8]}:0.5\n" in capsys.readouterr().out


def test_it_is_said_where_an_engine_of_fewer_bits_will_not_run(tmp_path):
    store = PlanStore(tmp_path / "bundle")
    unet = Plan("", "", 0, "unet/model.onnx", "", "tensorrt-rtx", "1.7", ("ampere+",), {})
    smaller = store.add(dataclasses.replace(unet, precision="int8"), b"plan", 0)
    built = [BuiltEngine(smaller, 1.0)]
    assert build._passed_over(SimpleNamespace(path=store.bundle), built) == []
    lora = (PlanLora("ab" * 32, 1.0),)
    for other in ({"version": "1.6"}, {"targets": ("sm_86",)}, {"loras": lora}, {"graph_hash": "1"}):
        store.add(dataclasses.replace(unet, **other), b"plan", 0)
    assert build._passed_over(SimpleNamespace(path=store.bundle), built) == []
    store.add(unet, b"plan", 0)
    assert build._passed_over(SimpleNamespace(path=store.bundle), built) == ["unet/model.onnx"]


@pytest.mark.parametrize(("precision", "targets"), [("int8", ()), ("fp8", ("sm_89", "sm_120"))])
def test_the_embedded_unet_in_eight_bits(rtx, embedded, precision, targets, capsys):
    """Its weights are stored in half precision and computed with in full, which a quantized product takes together."""
    command = ["build", str(embedded.path), "--engine", "tensorrt-rtx", "--part", "unet", "--precision", precision]
    assert main([*command, *(word for target in targets for word in ("--target", target)), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    store = PlanStore(embedded.path)
    plan = next(plan for plan in store.plans() if plan.file == told["file"])
    assert (plan.precision, plan.targets) == (precision, targets or ("ampere+",))
    assert store.read(plan)[:4] == b"vtrt"


def build_one(library, path, ranges=None, **options):
    ranges = ranges or {"x": ((1, 16, 128), (1, 16, 128), (2, 16, 128))}
    return bytes(build_plan(Job(library, path, ranges, **options)).content)


def test_turing_is_built_of_half_precision_only(rtx, tmp_path):
    half, full = matmul(tmp_path / "h" / "model.onnx", np.float16), matmul(tmp_path / "f" / "model.onnx", np.float32)
    assert build_one(rtx, half, targets=("sm_75",))[:4] == b"vtrt"
    message = refused(EngineError, build_one, rtx, full, targets=("sm_75",))
    assert message.startswith("f/model.onnx: tensorrt-rtx can't build it: ")
    assert message.endswith("sm_75 has no fp32 matrix product in TensorRT-RTX: export the bundle with --dtype fp16")


@pytest.mark.parametrize(("flags", "capturable"), [((), True), (("weight-streaming",), False)])
def test_the_library_takes_what_it_is_told_about_captures(rtx, graph, flags, capturable):
    assert ("REQUIRE_USER_ALLOCATION" in trt_network.builder_flags(rtx.module, flags)) is capturable
    assert build_one(rtx, graph, flags=flags)[:4] == b"vtrt"


def test_int8_weights_make_a_smaller_plan(rtx, tmp_path):
    path = matmul(tmp_path / "h" / "model.onnx", np.float16, side=1024)
    ranges = {"x": ((1, 16, 1024), (1, 16, 1024), (2, 16, 1024))}
    with prepared(path, {}, "int8", tmp_path / "work") as quantized:
        smaller = build_one(rtx, quantized, ranges)
    assert len(smaller) < 0.65 * len(build_one(rtx, path, ranges))


def test_fp8_is_built_for_ada_and_blackwell_and_refused_for_ampere(rtx, tmp_path):
    path = matmul(tmp_path / "h" / "model.onnx", np.float16)
    with prepared(path, {}, "fp8", tmp_path / "work", {"x": 4.0}) as quantized:
        assert build_one(rtx, quantized, targets=("sm_89", "sm_120"))[:4] == b"vtrt"
        message = refused(EngineError, build_one, rtx, quantized, targets=("sm_86",))
    assert message.endswith("sm_86 lacks a type of this graph: name other targets with --target")


def test_an_operator_that_tensorrt_rtx_does_not_have(rtx, tmp_path):
    path = matmul(tmp_path / "unet" / "model.onnx", np.float32)
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "OurProduct", "ours"
    onnx.save(model, path)
    message = refused(EngineError, read_inputs, rtx, path)
    assert message.startswith("unet/model.onnx: its node 'the_product' (OurProduct) is not supported (")
    assert message.endswith("); export the bundle with this version's vega-edge export")


@pytest.mark.parametrize("content", [b"", b"junk", "cut"])
def test_a_file_that_is_no_graph(rtx, graph, content):
    graph.write_bytes(graph.read_bytes()[:-20] if content == "cut" else content)
    message = refused(EngineError, read_inputs, rtx, graph)
    assert message.startswith("unet/model.onnx: it ")
    assert message.endswith("export it again")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "its weights are missing: there is no model.onnx_data beside it"),
        (lambda path: path.write_bytes(b"1234"), "its weights in model.onnx_data are truncated, 4 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its weights in model.onnx_data are truncated, 65535 bytes"),
    ],
)  # fmt: skip
def test_weights_that_are_not_there(rtx, graph, damage, message):
    damage(graph.with_name("model.onnx_data"))
    told = refused(EngineError, read_inputs, rtx, graph)
    assert told == f"unet/model.onnx: {message}; copy or export the bundle again"


def test_one_node_is_no_text_encoder(rtx, recipe_copy):
    """A folder without a manifest says nothing about its graphs."""
    (recipe_copy / MANIFEST).unlink()
    x, y = (helper.make_tensor_value_info(name, F32, ["n", 4]) for name in "xy")
    made = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        recipe_copy / "text_encoder" / "model.onnx",
    )
    bundle = Bundle.open(recipe_copy)
    options = BuildOptions("tensorrt-rtx", bundle_sizes(bundle), ("text_encoder",))
    assert refused(EngineError, build_engines, bundle, options) == (
        "text_encoder/model.onnx is not the graph of a text_encoder: it lacks an input input_ids with 2 axes, and has x "
        "with 2 axes; export the bundle again"
    )
    assert PlanStore(recipe_copy).plans() == ()


def test_the_builder_needs_no_torch():
    code = (
        "import sys, vega_edge.export.trt_build, vega_edge.verbs.build\n"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'diffusers', 'tensorrt_rtx') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# the command line


def test_build_and_engines(built, embedded, capsys):
    folder = str(embedded.path)
    assert main(["build", folder, "--engine", "tensorrt-rtx", "--part", "unet"]) == 0
    out, err = capsys.readouterr()
    unet = next(each.plan for each in built if each.plan.graph == "unet/model.onnx")
    assert out == f"{unet.file}\n"
    assert err.endswith(
        "vega-edge: this bundle calculates in fp32, and so do its engines; those of an export with --dtype fp16 are half as "
        f"large\nunet/model.onnx: {unet.bytes / 1e6:.1f} MB, there already\n"
    )
    assert main(["engines", "ls", folder]) == 0
    out, err = capsys.readouterr()
    assert (
        f"{unet.file}  {unet.bytes / 1e6:.1f} MB  tensorrt-rtx {unet.version} ampere+  sample 1x4x8x8..1x4x16x16..8x4x32x32"
        in out
    )
    assert f" MB in {folder}.engines" in err


def test_engines_rm_and_gc(embedded, rtx, tmp_path, capsys):
    folder = tmp_path / "demo"
    shutil.copytree(embedded.path, folder)
    options = BuildOptions("tensorrt-rtx", bundle_sizes(embedded), ("text_encoder",))
    (made,) = build_engines(Bundle.open(folder), options)
    assert main(["engines", "gc", str(folder)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["engines", "rm", str(folder), "nothing"]) == 2
    assert capsys.readouterr().err == (
        f"vega-edge: there is no engine nothing in {folder}.engines; see: vega-edge engines ls {folder}\n"
    )
    assert main(["engines", "rm", str(folder), made.plan.file]) == 0
    assert PlanStore(folder).plans() == ()
    build_engines(Bundle.open(folder), options)
    (PlanStore(folder).folder / made.plan.file).unlink()
    capsys.readouterr()
    assert main(["engines", "gc", str(folder)]) == 0
    assert capsys.readouterr().out == f"{made.plan.file}\n"
    assert PlanStore(folder).plans() == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "build --device must be cuda or cuda:N, such as cuda:0, not 'cpu'"),
        (["--device", "cuda:7"], "build --engine tensorrt-rtx needs no GPU, but for --refit and --stripped: leave --device out"),
        (["--device", "gpu1"], "device must be cpu, cuda or cuda:N, such as cuda:0, not 'gpu1'"),
        (["--part", "unett"], "unknown part 'unett'; did you mean 'unet'? there are: text_encoder, text_encoder_2, tiny_vae_decoder, unet, vae_decoder, vae_encoder"),
        (["--size", "100"], "a side must be a multiple of 32 px for this model, not 100"),
        (["--size", "99968"], "a side must be 64 to 256 px for this model, not 99968"),
        (["--size", "32:128:128"], "a side must be 64 to 256 px for this model, not 32"),
        (["--precision", "fp8"], "fp8 needs sm_89, sm_120, sm_121; ampere+ has none: name targets, or use int8"),
        (["--stripped", "--precision", "int8"], "--stripped puts in the weights of the bundle's graph, which are not int8: leave one of the two out"),
    ],
)  # fmt: skip
def test_build_with_wrong_options(rtx, embedded, arguments, message, capsys):
    assert main(["build", str(embedded.path), "--engine", "tensorrt-rtx", *arguments]) == 2
    assert capsys.readouterr().err == f"vega-edge: {message}\n"
