"""What the benchmarks conclude from their rows; the figures themselves are theirs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from vega_edge.bench import (
    export,
    full_size,
    meaning,
    meaning_dtypes,
    memory,
    parity,
    process,
    samplers,
    schedulers,
)  # fmt: skip

GOOD = meaning.Row("demo-vegart, LCM, 4 steps", "seen", 400, 97, 96, 98, 93.0, 90, 0.85, 20.0, 0.1)
CONTROL = meaning.Row(
    "control: demo-vega without the LoRA, LCM, 4 steps", "seen", 400, 90, 85, 97, 80.0, None, 0.75, 35.0, 0.1
)


def test_meaning_says_which_goal_is_missed() -> None:
    assert meaning.shortfalls([GOOD, CONTROL]) == []
    assert meaning.shortfalls([replace(GOOD, all=89.9), CONTROL]) == [
        "demo-vegart, LCM, 4 steps, seen: 89.9 %, goal 90"
    ]


def dtype_row(dtype: str, unet_bytes: int, right: float) -> meaning_dtypes.DtypeRow:
    return meaning_dtypes.DtypeRow(dtype, "onnxruntime-cpu", unet_bytes, 0, 0, replace(GOOD, title=dtype, all=right))


def test_dtypes_are_compared_with_fp32_and_fp16() -> None:
    rows = meaning_dtypes.relate(
        [dtype_row("fp32", 200, 95.0), dtype_row("fp16", 100, 94.5), dtype_row("int8", 55, 93.0)]
    )
    assert [(r.unet_ratio, r.points_lost) for r in rows] == [(2, 0), (1, 0.5), (0.55, 2)]
    assert meaning_dtypes.shortfalls(rows) == []
    rows = meaning_dtypes.relate(
        [dtype_row("fp32", 200, 95.0), dtype_row("fp16", 100, 92.9), dtype_row("int8", 56, 93.0)]
    )
    assert meaning_dtypes.shortfalls(rows) == [
        "fp16: 2.1 points lost, goal 2", "int8: the U-Net is 0.56 times fp16's, goal 0.55",
    ]  # fmt: skip


def test_meaning_wants_the_control_clearly_worse_on_every_measure() -> None:
    told = ["4 steps without the LoRA are not clearly worse than with it"]
    for same in ({"all": 91.0}, {"fit": 0.86}, {"teacher_rms": 19.0}):
        assert meaning.shortfalls([GOOD, replace(CONTROL, **same)]) == told


def test_parity_and_whole_processes_are_held_against_their_goals() -> None:
    close = parity.Parity("demo-vega", "Euler", 25, 3.0, 5e-4, 60.0)
    assert parity.shortfalls([close]) == []
    assert parity.shortfalls([replace(close, error=6e-4), replace(close, psnr_db=59.0)]) == [
        "demo-vega, Euler, guidance 3: 6.0e-04 and 60 dB, goal 0.0005 and 60 dB",
        "demo-vega, Euler, guidance 3: 5.0e-04 and 59 dB, goal 0.0005 and 60 dB",
    ]
    assert process.shortfalls({"ours": {"faster": 5.0, "memory": 1 / 3, "psnr_db": 60.0}}, 1.2) == []
    assert process.shortfalls({"ours": {"faster": 4.9, "memory": 0.4, "psnr_db": 58.4}}, 1.3) == [
        "ours: 4.9 times faster than diffusers, goal 5.0",
        "ours: 0.40 of diffusers' memory, goal 0.33",
        "ours: another picture than diffusers', 58 dB from it, goal 60",
        "import vega_edge: 1.30 of numpy's, goal 1.2",
    ]


def schedulers_row(family: str, name: str, percent: float, model: str = "demo-vega", steps: int = 25) -> schedulers.Row:
    return schedulers.Row(family, name, model, steps, 5.0, 60, percent, 0.2, "today")


def test_whole_processes_are_related_to_diffusers(tmp_path: Path) -> None:
    white, gray = tmp_path / "white.png", tmp_path / "gray.png"
    Image.new("RGB", (4, 4), (255, 255, 255)).save(white)
    Image.new("RGB", (4, 4), (204, 204, 204)).save(gray)
    assert process.likeness(white, white) == 99.0 and process.likeness(white, gray) == 14.0  # 51 of 255: 20 lg 5
    generate = {
        "ours": {"seconds": 1.0, "peak_mb": 100.0, "psnr_db": 51.0}, "diffusers": {"seconds": 8.0, "peak_mb": 400.0},
    }  # fmt: skip
    assert process.related(generate) == {"ours": {"faster": 8.0, "memory": 0.25, "psnr_db": 51.0}}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in process.table(generate).splitlines()[2:]]
    assert cells == [
        ["ours", "1.00 s", "100 MB", "8.0×", "0.25", "51 dB"], ["diffusers", "8.00 s", "400 MB", "1.0×", "1.00", ""],
    ]  # fmt: skip
    assert process.times([(3.0, 7.0), (1.0, 9.0), (2.5, 8.0)]) == {"seconds": 2.5, "least": 1.0, "most": 3.0}


def test_schedulers_are_held_against_the_euler_of_their_family() -> None:
    rows = [
        schedulers_row("diffusers", "Euler", 96.0),
        schedulers_row("diffusers", "DDIM", 86.0),
        schedulers_row("a1111", "Euler", 90.0),
        schedulers_row("a1111", "Restart", 79.9),
        schedulers_row("a1111", "Restart", 1.0, "demo-small-sd"),  # whose Euler is not here
        schedulers_row("diffusers", "PNDM", 85.9),
    ]
    restart, pndm = schedulers.shortfalls(rows)
    assert restart == "Restart (a1111, demo-vega): 79.9 %, Euler has 90.0; no reason is known"
    assert pndm.startswith("PNDM (diffusers, demo-vega): 85.9 %, Euler has 96.0; explicit multistep of fourth order")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in schedulers.table(rows).splitlines()[2:]]
    assert cells == [
        ["Euler", "96.0 %", "90.0 %", ""],
        ["DDIM", "86.0 %", "", ""],
        ["Restart", "", "79.9 %", "1.0 %"],
        ["PNDM", "85.9 %", "", ""],
    ]


def test_a_run_of_schedulers_replaces_its_own_rows_only(tmp_path: Path) -> None:
    kept = [
        schedulers_row("diffusers", "Euler", 96.0, "demo-tiny-sd"),
        schedulers_row("diffusers", "Euler", 99.0, steps=50),
    ]
    old, new = schedulers_row("diffusers", "Euler", 90.0), schedulers_row("diffusers", "Euler", 96.0)
    path = tmp_path / "schedulers.json"
    assert schedulers.merged(path, [new]) == [new]
    path.write_text(json.dumps({"rows": [asdict(row) for row in [old, *kept]]}))
    assert schedulers.merged(path, [new]) == [*kept, new]


def test_samplers_are_held_against_diffusers_and_a_millisecond() -> None:
    good = {"family": "diffusers", "name": "Euler", "stochastic": False, "ms": 0.99, "diffusers_ms": 2.0, "ratio": 0.5}
    drawing = {**good, "name": "Euler a", "stochastic": True, "ms": 5.0, "ratio": 1.3}
    alone = {**good, "name": "Restart", "stochastic": True, "ms": 9.0, "diffusers_ms": None, "ratio": None}
    assert samplers.shortfalls([good, drawing, alone]) == []
    assert samplers.shortfalls([{**good, "ms": 1.0, "ratio": 0.51}, {**drawing, "ratio": 1.31}]) == [
        "Euler (diffusers): 0.51 of diffusers' time, goal 0.5", "Euler (diffusers): 1.00 ms a step, goal below 1",
        "Euler a (diffusers): 1.31 of diffusers' time, goal 1.3",
    ]  # fmt: skip


def test_full_size_wants_every_part_and_the_latents() -> None:
    row = {"model": "tiny-sd", "parts": {"unet": 1e-3, "vae_decoder": 2e-6}, "latents_error_of_std": 0.01}
    assert full_size.missed(row) == []
    assert full_size.missed({**row, "parts": {"unet": 1.1e-3}, "latents_error_of_std": 0.011}) == [
        "tiny-sd, unet: 1.1e-03, goal 0.001",
        "tiny-sd: latents differ by 1.1e-02 of their standard deviation, goal 0.01",
    ]


def test_an_export_is_held_against_its_models_goals() -> None:
    parts = [
        {"part": "text_encoder", "clock_s": 200.0, "peak_over_weights": 9.0, "peak_bytes": 12_000_000_001},
        {"part": "unet", "clock_s": 90.0, "peak_over_weights": 1.61, "peak_bytes": 11_000_000_000},
    ]
    assert export.held_against_goals("segmind-vega", "fp16", parts) == [
        {"what": "unet, clock_s", "got": 90.0, "goal": 90.0, "met": True},
        {"what": "unet, peak_over_weights", "got": 1.61, "goal": 1.6, "met": False},
    ]
    assert export.held_against_goals("sdxl-lightning", "fp16", parts) == [
        {"what": "whole export, peak_bytes", "got": 12_000_000_001, "goal": 12e9, "met": False}
    ]
    assert export.held_against_goals("sdxl-lightning", "fp32", parts) == []
    assert export.held_against_goals("path/to/folder", "fp16", parts) == []


def test_a_lora_is_held_against_the_goals_for_vegarts() -> None:
    from vega_edge.bench import lora

    patched = {"modules": 233, "patch_s": 20.5, "patched_mb": 1475.0, "patch_peak_mb": 1390.06}
    assert lora.held_against_goals(patched) == [
        {"what": "patch_s", "got": 20.5, "goal": 20.0, "met": False},
        {"what": "patch_peak_mb", "got": 1390.1, "goal": 1475.0, "met": True},
    ]
    assert lora.held_against_goals({**patched, "modules": 232}) == []


def test_memory_is_held_against_the_goals_for_openvino() -> None:
    results = {
        f"{engine}, {way}": {"resident_ratio": ratio}
        for engine in ("onnxruntime-cpu", "openvino-bf16")
        for way, ratio in (("normal", 9.0), ("low, cold", 2.704), ("low, warm", 1.61))
    }
    assert memory.held_against_goals(results, "unet", "fp16") == [
        {"what": "openvino-bf16, low, cold", "got": 2.7, "goal": 2.7, "met": True},
        {"what": "openvino-bf16, low, warm", "got": 1.61, "goal": 1.6, "met": False},
    ]
    assert memory.held_against_goals(results, "all", "fp16") == []
    assert memory.held_against_goals(results, "unet", "fp32") == []


def test_an_engine_with_a_lora_is_measured_beside_the_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("psutil", reason="what a build takes is measured with psutil (the export extra)")
    from vega_edge.bench import engines

    engines.main(["demo-vegart", "--lora-rank", "4", "-o", str(tmp_path / "engines.json")])
    plain, patched = json.loads((tmp_path / "engines.json").read_text())["rows"]
    assert (plain["lora_rank"], patched["lora_rank"]) == (0, 4)
    assert plain["graph"] == patched["graph"] == "unet/model.onnx"
    assert abs(plain["mb"] - patched["mb"]) < 0.01 * plain["mb"]
    for row in (plain, patched):
        assert 0 <= row["prepared_s"] < row["seconds"]
        assert row["peak_gb"] > 0.1 and row["cpu_s"] > 0
    assert "| demo-vegart | unet/model.onnx | graph     | 4 " in capsys.readouterr().out
