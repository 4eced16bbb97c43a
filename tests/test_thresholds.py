"""Numbers at which the code takes another path: what happens just below each and just above. Those with tests of their own
beside what they belong to are not repeated here."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vega_edge import known_hashes, safetensors_file
from vega_edge.engines import SMALL_BYTES, choose_engine, compiled
from vega_edge.errors import CheckpointError, ExportError, NotEnoughMemoryError, UsageError
from vega_edge.runtime import init_image, memory_check, patches, rng_nv
from vega_edge.runtime.init_image import read_picture
from vega_edge.runtime.pictures import exif_comment
from vega_edge.runtime.rng import TorchGenerator
from vega_edge.runtime.rng_nv import PhiloxGenerator
from vega_edge.safetensors_file import read_header

# -- storage of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numbers", "kind"), [(64, "FLOAT"), (65, "FLOAT16")])
def test_weights_of_a_few_numbers_are_stored_as_they_are_computed(tmp_path: Path, numbers: int, kind: str) -> None:
    graph = written(tmp_path, numbers, "fp16")
    (weight,) = (i for i in graph.graph.initializer if i.name == "weight")
    import onnx

    assert onnx.TensorProto.DataType.Name(weight.data_type) == kind
    assert [node.op_type for node in graph.graph.node].count("Cast") == (kind == "FLOAT16")


@pytest.mark.parametrize(("numbers", "external"), [(256, False), (257, True)])
def test_weights_of_more_than_1024_bytes_lie_beside_the_graph(tmp_path: Path, numbers: int, external: bool) -> None:
    graph = written(tmp_path, numbers, "fp32")
    (weight,) = (i for i in graph.graph.initializer if i.name == "weight")
    assert bool(weight.external_data) == external and len(weight.raw_data) == (0 if external else 4 * numbers)


def written(folder: Path, numbers: int, weights: str) -> Any:
    """x @ weight, stored so and computed in fp32, without its external data loaded."""
    torch = pytest.importorskip("torch")
    import onnx
    import onnx_ir as ir

    from vega_edge.export import onnx_edit
    from vega_edge.export.packed import FLOATS, Stored
    from vega_edge.export.weights import place

    x, weight = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("x", (1, numbers)), ("weight", (numbers, 1)))
    )
    node = ir.node("MatMul", [x, weight])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([x, weight], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    stored = {"weight": Stored(torch.ones(numbers, 1, dtype=FLOATS[weights]))}
    place(model, {"weight": weight}, stored, "fp32", published=lambda name: name)
    onnx_edit.save(model, folder / "model.onnx")
    return onnx.load(folder / "model.onnx", load_external_data=False)


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False)])
def test_half_precision_ends_where_rounding_would_be_infinite(value: float, fits: bool) -> None:
    torch = pytest.importorskip("torch")
    from vega_edge.export.packed import Packed

    layer = torch.nn.Linear(1, 1)
    layer.weight.data[:] = value
    if fits:
        assert float(Packed("unet", layer, "fp16").stored["weight"].data) == 65504
    else:
        with pytest.raises(ExportError, match=r"weight holds 6\.55e\+04"):
            Packed("unet", layer, "fp16")


@pytest.mark.parametrize(("largest", "scale"), [(8188.0, 1.0), (8188.5, 0.25)])
def test_an_autoencoder_with_eight_times_the_room_is_left_as_it_is(largest: float, scale: float) -> None:
    pytest.importorskip("torch")
    from vega_edge.export.rescale import HEADROOM, LARGEST, scale_for

    assert scale_for(largest, forced=False) == scale
    assert scale == 1.0 or scale * largest * HEADROOM <= LARGEST < 2 * scale * largest * HEADROOM


@pytest.mark.parametrize(("elements", "worth"), [(4095, 0), (4096, 1)])
def test_matrices_of_4096_numbers_are_worth_fewer_bits_in_an_engine(elements: int, worth: int) -> None:
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from vega_edge.export.trt_graph import matrix_products

    weight = numpy_helper.from_array(np.ones((elements, 1), np.float32), "weight")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
    assert len(matrix_products(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight])))) == worth


# -- sizes of what is checked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample_size", "levels", "side"), [(15, 1, 15), (16, 1, 16), (17, 1, 16), (None, 1, 16), (4, 4, 16), (128, 4, 16)]
)
def test_a_comparison_is_of_16_latents_at_most_unless_the_network_halves_them_more_often(
    sample_size: int | None, levels: int, side: int
) -> None:
    pytest.importorskip("torch")
    from vega_edge.export.samples import latent_sizes

    first, second = latent_sizes({"block_out_channels": [8] * levels, "sample_size": sample_size})
    unit = 2 ** (levels - 1)
    assert (first.height, first.width) == (side, side) and (second.height, second.width) == (side + unit, side)


@pytest.mark.parametrize(("text", "most"), [("64", 64), ("65", None), ("1:1:64", 64), ("1:1:65", None)])
def test_engines_are_built_for_64_pictures_at_most(text: str, most: int | None) -> None:
    from vega_edge.export.trt_profiles import batch_range

    if most is None:
        with pytest.raises(UsageError, match="64"):
            batch_range(text)
    else:
        assert batch_range(text).most == most


@pytest.mark.parametrize(("spare", "refused"), [(0, False), (-1, True)])
@pytest.mark.parametrize("what", ["disk", "memory"])
def test_an_export_needs_all_the_room_that_it_will_take(
    what: str, spare: int, refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vega_edge.export import needs
    from vega_edge.export.precision import Precision

    each = 1_000_000
    disk, memory = int(each * 2 * needs.DISK_SLACK), int(each * 2 * needs.MEMORY_PER_WEIGHT) + needs.MEMORY_BASE
    free = {"disk": disk, "memory": memory}
    free[what] += spare
    monkeypatch.setattr(needs, "part_bytes", lambda *_: {"unet": each * 2})
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(needs, "_available_memory", lambda: free["memory"])
    checkpoint: Any = None
    if refused:
        with pytest.raises(ExportError, match=what):
            needs.check_room(checkpoint, Precision("fp16", "fp16"), ["unet"], tmp_path / "out")
    else:
        needs.check_room(checkpoint, Precision("fp16", "fp16"), ["unet"], tmp_path / "out")


@pytest.mark.parametrize(("size", "engine"), [(SMALL_BYTES - 1, "onnxruntime-cpu"), (SMALL_BYTES, "openvino")])
def test_a_model_of_100_mb_is_compiled(size: int, engine: str) -> None:
    pytest.importorskip("openvino")
    assert choose_engine(size, device="cpu") == engine


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "reads"), [(8, True), (9, False)])
def test_a_picture_of_as_many_pixels_as_are_read(
    width: int, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_image, "MAX_PIXELS", 64)
    Image.new("RGB", (width, 8)).save(tmp_path / "a.png")
    if reads:
        assert read_picture(tmp_path / "a.png").size == (8, 8)
    else:
        with pytest.raises(UsageError, match="9x8"):
            read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("letter", ["a", "é", "😀"])
@pytest.mark.parametrize("units", [31_998, 32_000, 32_002, 64_000, 70_000])
def test_any_comment_fits_into_a_jpeg(letter: str, units: int) -> None:
    """A segment of JPEG holds 64 KiB; letters beyond U+FFFF take two units of UTF-16."""
    text = letter * (units // (len(letter.encode("utf-16-be")) // 2))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif_comment(text))
    got = Image.open(file).getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert text.startswith(got) and (got == text) == (units <= 32_000)


@pytest.mark.parametrize(("extra", "reads"), [(0, True), (1, False)])
def test_a_header_of_the_formats_largest_size(
    extra: int, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_LONGEST_HEADER_BYTES", 200)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(200 + extra)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    if reads:
        assert read_header(tmp_path / "a.safetensors").entries.keys() == {"a"}
    else:
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "a.safetensors")


def test_hashes_are_remembered_from_16_mib_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(known_hashes, "_SETTLED_NS", -1)
    monkeypatch.setattr(known_hashes, "_known", {})
    for name, size in (("small", known_hashes.LEAST_BYTES - 1), ("large", known_hashes.LEAST_BYTES)):
        with open(tmp_path / name, "wb") as stream:
            stream.truncate(size)
        known_hashes.known_sha256(tmp_path / name)
    listed = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert "large" in listed and "small" not in listed


# -- sizes at which arithmetic is cut into pieces ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [63, 64, 65, 128, 129])
def test_strips_of_a_lora_add_up_to_the_whole(rows: int) -> None:
    values, delta = np.zeros((5, rows), np.float32), np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
    patches._add_transposed(values, delta)
    assert np.array_equal(values, delta.T)


@pytest.mark.parametrize("size", [rng_nv._CHUNK - 1, rng_nv._CHUNK, rng_nv._CHUNK + 1, 2 * rng_nv._CHUNK + 1])
def test_chunks_of_the_nv_source_are_one_draw(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    got = PhiloxGenerator(3).randn((size,))
    monkeypatch.setattr(rng_nv, "_CHUNK", 10**6)
    assert np.array_equal(got, PhiloxGenerator(3).randn((size,)))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33])
def test_draws_about_the_16_numbers_that_torch_makes_in_one_go(count: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.randn(count, generator=torch.Generator().manual_seed(5)).numpy()
    np.testing.assert_allclose(TorchGenerator(5, False).randn((count,)), theirs, atol=6e-7)


# -- what is free ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spare", "enough"), [(0, True), (-1, False)])
def test_a_bundle_opens_where_its_weights_just_fit(spare: int, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle: Any = SimpleNamespace(path="b", manifest=None)
    monkeypatch.setattr(memory_check, "weight_bytes", lambda _: {"unet": 1000, "vae_decoder": 500})
    for low, needed in ((False, 1500), (True, 1000)):
        monkeypatch.setattr(memory_check, "free_bytes", lambda: needed + spare)  # noqa: B023
        if enough:
            memory_check.check_weights(bundle, "onnxruntime-cpu", low)
        else:
            with pytest.raises(NotEnoughMemoryError):
                memory_check.check_weights(bundle, "onnxruntime-cpu", low)


@pytest.mark.parametrize(("size", "fits"), [(1000, True), (1001, False)])
def test_what_is_compiled_is_kept_where_it_just_fits(
    size: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "1")
    assert compiled.has_room(tmp_path / "cache" / "engine" / "entry", size) == fits


@pytest.mark.parametrize(("limit", "removed"), [(200, []), (199, ["old"])])
def test_the_cache_may_be_as_large_as_its_limit(limit: int, removed: list[str], tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old"]):
        (tmp_path / "engine" / name).mkdir(parents=True)
        (tmp_path / "engine" / name / "blob").write_bytes(bytes(100))
        os.utime(tmp_path / "engine" / name, (1000 - age, 1000 - age))
    assert [folder.name for folder in compiled.trim(tmp_path, limit)] == removed


@pytest.mark.parametrize(("free", "full"), [((1 << 20) - 1, True), (1 << 20, False)])
def test_a_write_that_fails_with_less_than_a_mebibyte_free_means_a_full_disk(
    free: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vega_edge.export import staging

    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    text = staging._why_not_written(tmp_path / "out", OSError("3 requested and 0 written"))
    assert text.startswith("disk full") == full


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "scale"), [(1.0, 1 / 127), (3.9e-6, 6e-8), (3.6e-6, 6e-8), (0.0, 1.0)])
def test_the_scale_of_eight_bits_is_never_0_in_half_precision(largest: float, scale: float) -> None:
    """3.8e-6 / 127 is half of fp16's least number: what is below is rounded to 0."""
    pytest.importorskip("onnx")
    from vega_edge.export.trt_graph import int8_scale

    got = int8_scale(np.array([[largest], [-largest / 2]], np.float16))
    assert got.dtype == np.float16 and got[0] == np.float16(scale) > 0


@pytest.mark.parametrize(("age_s", "stray"), [(599, False), (601, True)])
def test_files_of_a_build_are_strays_after_ten_minutes(age_s: float, stray: bool, tmp_path: Path) -> None:
    assert stray_at(tmp_path, "unlisted.plan", age_s) == stray


@pytest.mark.parametrize(("age_s", "stray"), [(86399, False), (86401, True)])
def test_locks_are_strays_after_a_day(age_s: float, stray: bool, tmp_path: Path) -> None:
    assert stray_at(tmp_path, ".key.lock", age_s) == stray


def stray_at(bundle: Path, name: str, age_s: float) -> bool:
    from vega_edge.engines import plan_store

    now = 1_800_000_000.0
    store = plan_store.PlanStore(bundle)
    store.folder.mkdir()
    (store.folder / name).touch()
    os.utime(store.folder / name, (now - age_s, now - age_s))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_store.time, "time", lambda: now)
        return store.stray() == [store.folder / name]


# -- the server --------------------------------------------------------------------------------------------------------


def test_the_time_of_a_batch_is_the_least_of_the_last_three() -> None:
    from vega_edge.serve.batching import Batching

    batching = Batching(2)
    for seconds in (1.0, 9.0, 9.0):
        batching.learn("kind", 1, seconds)
    batching.learn("kind", 2, 4.0)  # 2 s for each
    assert batching.best("kind", [1, 2]) == 1
    batching.learn("kind", 1, 9.0)  # the first is the fourth last now
    assert batching.best("kind", [1, 2]) == 2


def test_what_was_learned_is_forgotten_at_the_200th_decision() -> None:
    from vega_edge.serve.batching import Batching

    batching = Batching(2)
    batching.learn("kind", 1, 1.0)
    batching.learn("kind", 2, 9.0)
    assert [batching.best("kind", [1, 2]) for _ in range(199)] == [1] * 199
    assert batching.best("kind", [1, 2]) == 2  # neither was tried, so the larger is
