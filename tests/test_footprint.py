"""The estimate of the memory that an image takes, and what is refused because of it, before anything runs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vega_edge.bundle import Bundle
from vega_edge.engines import ENGINES, runs_on_cpu, takes_attention_form
from vega_edge.errors import NotEnoughMemoryError
from vega_edge.models import find_bundle
from vega_edge.runtime import footprint, memory, memory_check
from vega_edge.runtime.footprint import Drawing, Footprint
from vega_edge.runtime.memory_check import TOLERANCE, MemoryCheck
from vega_edge.runtime.pipeline import Pipeline
from vega_edge.serve.service import status_of


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(find_bundle("demo-vegart"), verify=False)


def of(bundle: Bundle, engine: str = "onnxruntime-cpu", **options: Any) -> Footprint:
    found = Footprint.of(bundle, engine, **options)
    assert found is not None
    return found


TINY_SD = {"text_encoder": 492_000_000, "unet": 1_294_000_000, "vae_decoder": 198_000_000}  # bytes, in fp32


def real(
    unet: str = "unet-tiny-sd",
    vae: str = "vae-sd",
    engine: str = "onnxruntime-cpu",
    stored: str = "fp32",
    weights: Mapping[str, int] = TINY_SD,
    **changes: Any,
) -> Footprint:
    """A full-size model's, from the configurations that this package has of it."""
    folder = Path(footprint.__file__).parents[1] / "models" / "configs"
    configs = [json.loads((folder / f"{name}.json").read_text()) for name in (unet, vae)]
    costs = footprint.COSTS[engine]
    over, late = (dict.fromkeys(weights, table[stored]) for table in (costs.opened, costs.late))
    values = {"low": False, "tiles": True, **changes}
    return Footprint(engine, weights, costs, over, late, *configs, False, **values)


RESULTS = Path(footprint.__file__).parents[1] / "benchmarks" / "results"


def measured() -> Iterator[Any]:
    """What was measured: the images of real-size.json, 512 px, guided where the model is, and those of image-memory.json."""
    files = ("real-size.json", "image-memory.json")
    sizes, memory = (json.loads((RESULTS / name).read_text())["rows"] for name in files)
    for row in sizes:
        for engine, image in row["engines"].items():
            if "error" not in image:
                drawing = Drawing(512, 512, guided=image["guidance"] > 1)
                here = real(*CONFIGS[row["model"]], engine, row["weights"], row["weight_bytes"])
                name = f"{row['model']}-{row['dtype']}-{engine}"
                yield pytest.param(here, drawing, image["peak_gib"] * 2**30, id=name)
    for row in memory:
        model = row["bundle"].rpartition("-")[0]
        if model in CONFIGS:  # not the embedded one, which is mostly Python
            low, side = row["memory"] == "low", row["size_px"]
            here = real(*CONFIGS[model], row["engine"], row["weights"], row["weight_bytes"], low=low)
            name = f"{row['bundle']}-{row['engine']}-{side}px-{row['memory']}"
            yield pytest.param(here, Drawing(side, side), row["peak_gb"] * 1e9, id=name)


CONFIGS = {
    "tiny-sd": ("unet-tiny-sd", "vae-sd"), "small-sd": ("unet-small-sd", "vae-sd"),
    "segmind-vegart": ("unet-segmind-vega", "vae-sdxl"),
    "sdxl-lightning": ("unet-sdxl", "vae-sdxl"),
}  # fmt: skip


@pytest.mark.parametrize(("here", "drawing", "peak"), measured())
def test_the_estimates_of_real_sizes_are_near_what_was_measured(here: Footprint, drawing: Drawing, peak: float) -> None:
    assert abs(here.total(drawing) - peak) <= TOLERANCE * peak


def test_more_of_anything_takes_more() -> None:
    here = real()
    base = Drawing(512, 512)
    assert here.running(Drawing(768, 512)) > here.running(base)
    assert here._unet_bytes(Drawing(512, 512, samples=2)) == 2 * here._unet_bytes(base)
    assert here._unet_bytes(Drawing(512, 512, guided=False)) == here._unet_bytes(base) / 2
    assert here._unet_bytes(Drawing(1024, 1024)) == 4 * here._unet_bytes(base)
    assert here.total(base) == here.costs.process + here.opened + here.running(base)


def test_attention_without_tiles_holds_score_matrices() -> None:
    """Of 2 samples, 8 heads, 4096 tokens each way, 4 bytes: 1.07 GB a copy at 512 px, and 16 times that at 1024."""
    one = 2 * 8 * 4096**2 * 4
    plain, fused = (real(tiles=tiles) for tiles in (False, True))
    for side, times in ((512, 1), (1024, 16)):
        extra = plain._unet_bytes(Drawing(side, side)) - fused._unet_bytes(Drawing(side, side))
        assert extra == footprint.COSTS["onnxruntime-cpu"].scores * one * times


def test_above_512_px_the_decoder_counts_more() -> None:
    here = real()
    more = here.costs.decoder_large / here.costs.decoder
    small, large = (here._decoder_bytes(Drawing(512, height)) for height in (512, 520))
    assert large / small == pytest.approx(more * 520 / 512, rel=1e-3)


def test_large_images_are_decoded_in_tiles() -> None:
    here = real()
    assert here._decoder_bytes(Drawing(960, 896)) < here._decoder_bytes(Drawing(896, 896)) * 0.7
    low = real(low=True)
    assert low._decoder_bytes(Drawing(832, 832)) < here._decoder_bytes(Drawing(832, 832)) / 2


def test_a_second_image_takes_what_the_first_one_left(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's networks keep the memory of their largest image, which is no longer free then; onnxruntime's do not."""
    for engine, again in (("openvino", True), ("onnxruntime-cpu", False)):
        check = MemoryCheck(bundle, engine, False, "full", 64, 8)
        needed = Footprint.of(bundle, engine).running(Drawing(512, 512))  # type: ignore[union-attr]
        for free, drawing, fits in (
            (needed, Drawing(512, 512), True), (0, Drawing(512, 512), again), (0, Drawing(256, 256), again),
            (0, Drawing(520, 512), False),
        ):  # fmt: skip
            monkeypatch.setattr(memory_check, "free_bytes", lambda free=free: free)
            if fits:
                check(drawing)
            else:
                with pytest.raises(NotEnoughMemoryError):
                    check(drawing)


@pytest.mark.parametrize("missing", ["attention_head_dim", "down_block_types", "layers_per_block"])
def test_what_a_configuration_leaves_out_is_as_diffusers_has_it(missing: str) -> None:
    config = json.loads((Path(footprint.__file__).parents[1] / "models" / "configs" / "unet-sd15.json").read_text())
    less = {key: value for key, value in config.items() if key != missing}
    assert footprint.scores(less, 4096, 77) == footprint.scores(config, 4096, 77) == 8 * 4096**2
    assert footprint._unet_floats(less) == footprint._unet_floats(config)


def test_every_engine_on_the_cpu_has_its_costs() -> None:
    assert set(footprint.COSTS) == {name for name in ENGINES if runs_on_cpu(name)}


def test_as_measured() -> None:
    """Tiny-SD on onnxruntime 1.32, one guided sample, beyond what was open: benchmarks/image_memory.py."""
    here = real()
    for measured, estimated in (
        (349e6, here._unet_bytes(Drawing(512, 512))),
        (275e6, here._decoder_bytes(Drawing(256, 256))),
        (1108e6, here._decoder_bytes(Drawing(512, 512))),
    ):
        assert abs(estimated - measured) <= TOLERANCE * measured


def test_with_little_memory_the_largest_network_counts() -> None:
    """Each is closed before the next is opened, with what its run added."""
    drawing = Drawing(512, 512)
    for engine in ("onnxruntime-cpu", "openvino"):
        low, normal = (real(engine=engine, low=low) for low in (True, False))
        assert low.opened == 0
        largest = low._open("unet") + low._late("unet") + low._unet_bytes(drawing)
        assert low.running(drawing) == int(largest) < normal.total(drawing)
    decoder = 3_000_000_000
    low = real(engine="openvino", low=True, weights={**TINY_SD, "vae_decoder": decoder})
    costs = low.costs.opened["fp32"] + low.costs.late["fp32"]
    assert low.running(drawing) == pytest.approx(decoder * costs + low._decoder_bytes(drawing))


def test_a_part_may_store_its_weights_in_another_form(bundle: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    manifest = json.loads((path / "vega-edge.json").read_text())
    manifest["parts"]["unet"]["weights"] = "int8"
    (path / "vega-edge.json").write_text(json.dumps(manifest))
    here = of(Bundle.open(path, verify=False), "openvino")
    assert here.opened_over["unet"] == here.costs.opened["int8"] and here.late_over["unet"] == here.costs.late["int8"]
    assert here.opened_over["text_encoder"] == here.costs.opened["fp16"]


def test_a_picture_to_start_from_adds_the_encoder(bundle: Bundle) -> None:
    """Once open it stays; with little memory it is open alone, and a picture of this size is decoded in tiles."""
    for low, more in ((False, 140_000_000), (True, 0)):
        here = real(low=low, encoder=140_000_000)
        without, with_image = (here.running(Drawing(512, 512, image=image)) for image in (False, True))
        assert with_image == without + more
    large = Drawing(1024, 1024, guided=False, image=True)
    here = real(low=True, encoder=140_000_000)
    assert here.running(large) == int(here.costs.decoder_large * 1024**2 * 4 * 3 * 128 + 140_000_000)
    assert of(bundle).encoder > 0


def test_what_has_no_estimate(bundle: Bundle, tmp_path: Path) -> None:
    assert Footprint.of(bundle, "onnxruntime-cuda") is None
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (path / "vega-edge.json").unlink()
    config = path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": None}))
    assert Footprint.of(Bundle.open(path, verify=False), "onnxruntime-cpu") is None


def test_the_form_of_the_attention_counts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        takes_attention_form("onnxruntime-cpu") and not of(bundle).tiles
    )  # the embedded model has the plain graph alone
    assert of(bundle, "openvino").tiles
    monkeypatch.setattr(Bundle, "has", lambda self, file: True)
    for tiled in (True, False):
        monkeypatch.setattr(footprint, "tiles_attention", lambda engine, tiled=tiled: tiled)
        assert of(bundle).tiles == tiled


def checked(
    bundle: Bundle, drawing: Drawing, free: int | None, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    monkeypatch.setattr(memory_check, "free_bytes", lambda: free)
    given = {"engine": "onnxruntime-cpu", "low": False, "vae": "full", **options}
    MemoryCheck(bundle, least_px=64, multiple_px=32, **given)(drawing)


def test_both_sides_of_what_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawing = Drawing(512, 512)
    needed = of(bundle).running(drawing)
    least = int(needed / (1 + TOLERANCE))
    checked(bundle, drawing, None, monkeypatch)  # the system does not tell
    checked(bundle, drawing, 1, monkeypatch, engine="onnxruntime-cuda")  # another memory
    checked(bundle, drawing, needed, monkeypatch)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        checked(bundle, drawing, least + 1, monkeypatch)
    assert len(caplog.messages) == 1
    with pytest.raises(NotEnoughMemoryError):
        checked(bundle, drawing, least - 1, monkeypatch)


@pytest.mark.parametrize(
    ("drawing", "options", "offered"),
    [
        (Drawing(1024, 1024, samples=4), {}, "--samples 1"),
        (Drawing(512, 512), {}, "--engine openvino-bf16"),
        (Drawing(512, 512), {"engine": "openvino-bf16"}, "--memory low"),
        (Drawing(512, 512), {"engine": "openvino-bf16", "low": True}, "--vae tiny"),
        (Drawing(512, 512), {"engine": "openvino-bf16", "vae": "tiny", "low": True}, "--size "),
    ],
)
def test_only_what_fits_is_offered(
    bundle: Bundle, drawing: Drawing, options: dict[str, Any], offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "can_run", lambda name, precision: True)
    given = {"engine": "onnxruntime-cpu", "low": False, "vae": "full", **options}
    here = of(bundle, given["engine"], low=given["low"], vae=given["vae"])
    free = int(here.running(drawing) * 0.75)
    with pytest.raises(NotEnoughMemoryError) as error:
        checked(bundle, drawing, free, monkeypatch, **given)
    text = str(error.value)
    assert f"this fits: {offered}" in text
    assert f"about {memory_check._size(here.running(drawing))} " in text and f", {memory_check._size(free)} " in text
    if offered == "--size ":
        width, _, height = text.rpartition(" ")[2].partition("x")
        assert here.running(Drawing(int(width), int(height))) <= free


def test_where_nothing_fits_nothing_is_offered(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "can_run", lambda name, precision: True)
    with pytest.raises(NotEnoughMemoryError) as error:
        checked(bundle, Drawing(512, 512), -(10**9), monkeypatch)
    assert "this fits" not in str(error.value)


def test_nothing_runs_before_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.open("demo-vegart", "onnxruntime-cpu", verify=False) as pipe:
        monkeypatch.setattr(pipe, "_text", None)
        monkeypatch.setattr(memory_check, "free_bytes", lambda: 0)
        with pytest.raises(NotEnoughMemoryError) as error:
            pipe("a star", steps=1, width=256, height=256)
        with pytest.raises(NotEnoughMemoryError):
            next(pipe.stream("a star", steps=1, width=256, height=256))
    assert status_of(error.value)[0] == 503


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 3000000 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, usage, ""),))
    system = 3_000_000 * 1024
    assert memory.free_bytes() == system  # no control group
    usage.write_text("700000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\ninactive_file 60000000\nactive_file 40000000\n")
    for text, free in (
        ("max\n", system),
        ("1000000000\n", 400_000_000),
        ("8000000000\n", system),
        ("5000\n", 0),
        (f"{2**63 - 4096}\n", system),
    ):
        limit.write_text(text)
        assert memory.free_bytes() == free, text
    meminfo.unlink()
    limit.write_text("1000000000\n")
    assert memory.free_bytes() == 400_000_000


def build(sizes: Any, free: int | None, monkeypatch: pytest.MonkeyPatch, dtype: str = "fp32", **options: Any) -> None:
    from vega_edge.export.trt_build import BuildOptions, check_scores

    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    config = json.loads((Path(footprint.__file__).parents[1] / "models" / "configs" / "unet-tiny-sd.json").read_text())
    manifest = SimpleNamespace(dtype=dtype) if dtype else None
    made = SimpleNamespace(path="tiny-sd", manifest=manifest, config=lambda part: config, levels=lambda part: 4)
    check_scores(made, BuildOptions(**{"library": "tensorrt-rtx", "sizes": sizes, **options}))  # type: ignore[arg-type]


def test_attention_in_fp32_that_is_too_large_to_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile of a default export asked TensorRT-RTX for 70 GB."""
    from vega_edge.export.trt_profiles import Range, Sizes

    sides = Range(256, 512, 1024)
    sizes = Sizes(sides, sides, Range(1, 1, 4))
    matrix = 4 * 2 * 8 * 16384**2 * 4  # images, guidance, heads, tokens each way, bytes
    build(sizes, matrix, monkeypatch)
    with pytest.raises(NotEnoughMemoryError, match=r"68\.7 GB.*--dtype fp16"):
        build(sizes, matrix - 1, monkeypatch)
    with pytest.raises(NotEnoughMemoryError):  # a bundle of another tool does not say what it is in
        build(sizes, matrix - 1, monkeypatch, dtype="")
    for dtype in ("fp16", "int8"):
        build(sizes, matrix - 1, monkeypatch, dtype=dtype)
    build(sizes, matrix - 1, monkeypatch, library="tensorrt")
    build(sizes, None, monkeypatch)
    small = Sizes(Range(512, 512, 512), Range(512, 512, 512), Range(1, 1, 1))
    build(small, matrix // 64, monkeypatch)  # 16 times less a matrix, 4 times fewer images
