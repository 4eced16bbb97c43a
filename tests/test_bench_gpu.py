"""The GPU benchmark, tried on a CPU with the embedded model: what it counts and how it sums up."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vega_edge import Pipeline
from vega_edge.bundle import Bundle
from vega_edge.cli import main
from vega_edge.models import recipes

pytest.importorskip("torch")
import torch

from vega_edge.bench import gpu, gpu_peers
from vega_edge.bench.gpu_peers import decoder_dtype, flops, matmul_peak, pipeline_flops
from vega_edge.bench.gpu_report import captured, shortfalls, summary
from vega_edge.engines.checked import CheckedEngine
from vega_edge.engines.plan_engine import PlanEngine
from vega_edge.engines.plan_range import Rebuild, SeveralPlans

from .fake_device import FakeDevice, FakeProgram


def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu", "demo-vegart"]) == 1
    assert capsys.readouterr().err == (
        f"vega-edge: torch {torch.__version__} finds no GPU here, and the peers run on one: install torch for CUDA, or try the "
        "program with --device cpu\n"
    )


def test_without_torch_it_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "vega_edge.bench.gpu")
    monkeypatch.delattr("vega_edge.bench.gpu")
    monkeypatch.delitem(sys.modules, "vega_edge.bench.gpu_peers")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "gpu", "demo-vegart"]) == 1
    assert capsys.readouterr().err == (
        'vega-edge: bench gpu draws beside diffusers, and torch is not installed here; pip install "vega-edge[export]"\n'
    )


def test_on_a_cpu(tmp_path, capsys):
    bundle, out = recipes()["demo-vegart"].bundle_path, tmp_path / "results" / "gpu.json"
    gpu.main([
        str(bundle), "--device", "cpu", "--engine", "onnxruntime-cpu", "--batches", "2", "--runs", "1",
        "--peers", "eager", "--size", "64", "-o", str(out),
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert [(row["model"], row["batch"], row["steps"]) for row in result["rows"]] == [("demo-vegart", 2, 4)]
    for row in result["rows"]:
        ours, eager = row["sides"]["ours"], row["sides"]["eager"]
        assert set(ours["parts"]) == {"text", "denoise", "decode", "outside the engines"}
        assert set(eager["parts"]) == {"text", "denoise", "decode"}
        assert row["ratios"]["eager"] == pytest.approx(eager["p50_s"] / ours["p50_s"], rel=0.02)
        assert 0 < ours["parts"]["outside the engines"]["p50_s"] < ours["p50_s"]
        assert row["first_picture_s"] > 0
        assert set(row["cuda_graphs"]) >= {"text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/pixels.onnx"}
        assert set(row["cuda_graphs"].values()) == {None}  # onnxruntime's own
    assert {"date", "commit", "versions", "matmul_tflops", "gpu"} <= set(result)
    assert capsys.readouterr().out.count("\n| demo-vegart | onnxruntime-cpu |") == 1


def test_both_sides_take_the_same_steps_and_other_words_each_time(monkeypatch):
    pipe = Pipeline.open(recipes()["demo-vegart"].bundle_path, "onnxruntime-cpu", verify=False)
    settings, prompts = {"steps": 2, "width": 128, "height": 128}, []
    request = pipe.request
    monkeypatch.setattr(pipe, "request", lambda p, **o: prompts.append((p, o["negative"])) or request(p, **o))
    parts = [gpu.draw_ours(pipe, settings, seed, 1) for seed in range(2)]
    assert [len(set(texts)) for texts in zip(*prompts, strict=True)] == [2, 2]
    assert all(part["text"] > 0 for part in parts)
    with pytest.raises(SystemExit, match="ours ran its U-Net 2 times for 3 steps; nothing was compared"):
        gpu.check_calls("ours", 2, 3)
    pipe.close()


def test_the_peers_decoder_has_our_precision():
    bundle = Bundle.open(recipes()["demo-vegart"].bundle_path, verify=False)
    for whole, part, wanted in (("fp16", None, "float16"), ("fp16", "fp32", "float32"), ("bf16", None, "bfloat16")):
        parts = {"vae_decoder": dataclasses.replace(bundle.manifest.parts["vae_decoder"], dtype=part)}
        manifest = dataclasses.replace(bundle.manifest, dtype=whole, parts=parts)
        assert str(decoder_dtype(dataclasses.replace(bundle, manifest=manifest))) == f"torch.{wanted}"


def test_goals_are_judged_at_batch_1():
    ours = {"p50_s": 1.0, "parts": {"outside the engines": {"p50_s": 0.02}}}
    row = {
        "model": "m",
        "batch": 1,
        "ratios": {"eager": 1.6, "compiled": 1.2},
        "sides": {"ours": ours},
        "first_picture_s": 1.9,
    }
    assert shortfalls([row]) == []
    slow = {"p50_s": 1.0, "parts": {"outside the engines": {"p50_s": 0.04}}}
    worse = {**row, "ratios": {"eager": 1.4, "compiled": 1.05}, "sides": {"ours": slow}, "first_picture_s": 2.5}
    assert shortfalls([row, worse, {**worse, "batch": 4}]) == [
        "m: 1.40x eager, goal 1.5x", "m: 1.05x compiled, goal 1.1x", "m: 4.0% of the time outside the engines, goal 3%",
        "m: first picture after 2.5 s, goal 2 s",
    ]  # fmt: skip


def test_turns_alternate_and_leave_the_warm_up_out():
    calls = []
    taken = gpu.turns({name: lambda seed, n=name: calls.append(n) or {} for name in "ab"}, runs=2, warm=1)
    assert calls == list("ababab")
    assert {name: len(each) for name, each in taken.items()} == {"a": 2, "b": 2}


def test_summary():
    taken = [{"denoise": d, "all": a} for d, a in ((1, 2), (2, 4), (3, 6))]
    got = summary(taken, batch=2, work=8e12, peak=4e12)
    assert (got["p50_s"], got["pictures_per_s"], got["tflops"], got["share_of_peak"]) == (4, 0.5, 2, 0.5)
    assert got["parts"] == {"denoise": {"p50_s": 2, "p95_s": 2.9}}


def test_work_counted_on_the_embedded_model():
    bundle = Bundle.open(recipes()["demo-vegart"].bundle_path)
    small, large = (
        flops(bundle, "denoise", {"steps": 4, "guidance": 0, "width": s, "height": 128}) for s in (128, 256)
    )
    assert 1.9 * small < large < 2.2 * small  # a little more than twice: attention grows with the square
    work = {"text": 1.0, "denoise": 10.0, "decode": 100.0}
    assert pipeline_flops(work, {"steps": 4, "guidance": 0}, 2) == 1 + 2 * (40 + 100)
    assert pipeline_flops(work, {"steps": 4, "guidance": 3.0}, 1) == 2 + 80 + 100


@pytest.mark.parametrize("several", [False, True])
def test_graphs_that_were_captured_are_counted(several):
    device, wide = FakeDevice(), {"x": ((1, 1), (1, 8), (4, 64))}
    engine = PlanEngine(FakeProgram(device, [wide]), device, Rebuild(""))
    opened = CheckedEngine(
        SeveralPlans([wide], lambda i: engine) if several else engine, "tensorrt", Path("unet/m.onnx")
    )
    counts = []
    for n in (16, 16, 16, 8, 8):
        opened.run({"x": np.zeros((1, n), np.float32), "b": np.float32([0])})
        counts.append(captured(opened))
    assert counts == [0, 1, 1, 1, 2]


def test_what_the_peak_was_measured_with_is_given_back(monkeypatch):
    """Else a peer is given it again, and what it takes of the GPU's memory seems less than it is."""
    alive = []

    def empty_cache():
        alive.append(sum(type(o) is torch.Tensor and o.shape == (123, 123) for o in gc.get_objects()))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert matmul_peak("meta", 123) > 0
    assert alive == [0]


def test_the_compiled_peer_is_one_graph_and_draws(monkeypatch):
    """Traced whole, as fullgraph asks, but run by torch as it is: compiling for a CPU takes minutes."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_whole = torch.compile

    def without_a_mode(network, mode, **options):
        assert mode == "max-autotune"
        return compile_whole(network, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", without_a_mode)
    bundle = Bundle.open(recipes()["demo-vegart"].bundle_path, verify=False)
    settings = {"steps": 2, "guidance": 3.0, "width": 64, "height": 64}
    compiled = gpu_peers.peer(bundle, settings, "cpu", compile_mode="max-autotune", batch=1)
    for seed in range(2):
        assert set(compiled(seed)) == {"text", "denoise", "decode"}
        gpu.check_calls("compiled", compiled.calls, 2)
    compiled.close()
    assert len(traced) == 2  # the U-Net and the decoder, each once for all steps and pictures
