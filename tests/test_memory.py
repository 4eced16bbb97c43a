"""One network at a time, memory that does not suffice, tiles, and what is kept of compiling."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vega_edge.bundle import Bundle
from vega_edge.engines import BuiltFor, compiled, open_engine
from vega_edge.engines.choice import missing_here
from vega_edge.errors import BundleError, EngineError, NotEnoughMemoryError, UsageError
from vega_edge.models import find_bundle
from vega_edge.runtime import decoder, memory, memory_check, parts, pipeline
from vega_edge.runtime.decoder import Decoder
from vega_edge.runtime.parts import Part, Parts, cache_folder
from vega_edge.runtime.patches import Patches
from vega_edge.runtime.pipeline import Pipeline
from vega_edge.runtime.tiles import decode_in_tiles
from vega_edge.tiling import TILING

STAR = "a big red star on a blue background"
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 7, "guidance": 2.0, "samples": 2}


class Counted:
    """An engine that tells how many are open at once."""

    open = most = 0

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.inputs, self.outputs, self.run = engine.inputs, engine.outputs, engine.run
        Counted.open += 1
        Counted.most = max(Counted.most, Counted.open)

    def close(self) -> None:
        Counted.open -= 1
        self._engine.close()


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
def test_low_memory_draws_the_same_with_one_network_open(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := missing_here(engine):
        pytest.skip(missing.why)
    bundle = find_bundle("demo-vegart")
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    normal = Pipeline.open(bundle, engine, verify=False)(STAR, **OPTIONS)
    plain_open = parts.open_engine
    monkeypatch.setattr(parts, "open_engine", lambda *a, **k: Counted(plain_open(*a, **k)))
    monkeypatch.setattr(Counted, "most", 0)
    low = Pipeline.open(bundle, engine, verify=False, memory="low")
    for _ in range(2):  # the second time from the cache
        result = low(STAR, **OPTIONS)
        assert np.abs(result.latents - normal.latents).max() <= 1e-4 * np.abs(normal.latents).max()
        pixels = [np.asarray(i).astype(int) for i in (*result.images, *normal.images)]
        assert np.abs(pixels[0] - pixels[2]).max() <= 1 and np.abs(pixels[1] - pixels[3]).max() <= 1
    assert (Counted.most, Counted.open) == (1, 0)
    step = next(stream := low.stream(STAR, **OPTIONS))
    assert Counted.open == 1 and len(step.preview()) == 2
    stream.close()
    assert Counted.open == 0
    entries = list((tmp_path / "compiled").glob("*/*"))
    assert len(entries) == 5 and {e.parent.name.rpartition("-")[0] for e in entries} == {engine}


def test_a_part_is_shared_kept_and_closed() -> None:
    made: list[Any] = []

    class Engine:
        closed = False

        def close(self) -> None:
            self.closed = True

    def open_graph() -> Any:
        made.append(Engine())
        return made[-1]

    part = Part(open_graph, keep=False)
    part.load()
    assert not made
    with part.running() as first:
        with part.running() as second:
            assert first is second
        assert not made[0].closed
    assert made[0].closed
    kept = Part(open_graph, keep=True)
    kept.load()
    with kept.running() as engine:
        assert engine is made[1]
    assert not made[1].closed
    kept.close()
    assert made[1].closed
    with pytest.raises(EngineError) as error, kept.running():
        pass
    assert str(error.value) == "this pipeline was closed; open it again"


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = find_bundle("demo-vegart")
    bundle = Bundle.open(path, verify=False)
    sizes = memory.weight_bytes(bundle.path)
    assert set(sizes) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "tiny_vae_decoder"}
    whole, largest = sum(sizes.values()), max(sizes.values())
    monkeypatch.setattr(memory_check, "free_bytes", lambda: largest - 1)
    for low, cure, size, where in (
        (False, "--memory low opens one network at a time", whole, ""),
        (True, "close other programs, or use a smaller model", largest, " in one network"),
    ):
        with pytest.raises(NotEnoughMemoryError) as error:
            memory_check.check_weights(bundle, "onnxruntime-cpu", low)
        have = f"{(largest - 1) / 1e6:.0f} MB of memory are free"
        assert str(error.value) == f"bundle {path} has {size / 1e6:.0f} MB of weights{where}, {have}; {cure}"
    monkeypatch.setattr(memory_check, "free_bytes", lambda: whole + 1)
    with caplog.at_level(logging.WARNING):
        memory_check.check_weights(bundle, "onnxruntime-cpu", False)
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("; --memory low opens one network at a time")
    costs, weights = memory_check.COSTS["openvino"], "fp16"
    likely = int(whole * (costs.opened[weights] + costs.late[weights]))
    for free, warnings in ((likely, 0), (likely - 1, 1)):
        caplog.clear()
        monkeypatch.setattr(memory_check, "free_bytes", lambda free=free: free)
        memory_check.check_weights(bundle, "openvino", False)
        assert len(caplog.messages) == warnings
    monkeypatch.setattr(memory_check, "free_bytes", lambda: None)
    memory_check.check_weights(bundle, "onnxruntime-cpu", False)
    monkeypatch.setattr(memory_check, "free_bytes", lambda: 1)
    memory_check.check_weights(bundle, "onnxruntime-cuda", False)  # another memory
    with pytest.raises(NotEnoughMemoryError):
        Pipeline.open(path, "onnxruntime-cpu", verify=False)


def test_free_memory_as_linux_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text(
        "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable:    3000 kB\nSwapFree:  500 kB\nHugePages_Total: 0\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", told)
    monkeypatch.setattr(memory, "_CGROUPS", ())
    assert memory.free_bytes() == 3500 * 1024
    told.write_text("MemFree: 10 kB\n")
    assert memory.free_bytes() is None


def test_options_of_opening(tmp_path: Path) -> None:
    path = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    (path / "vega-edge.json").unlink()
    shutil.rmtree(path / "tiny_vae_decoder")
    for options, message in (
        ({"memory": "little"}, "unknown memory 'little'; there are: low, normal"),
        ({"vae": "huge"}, "unknown vae 'huge'; there are: full, tiny"),
    ):
        with pytest.raises(UsageError) as error:
            Pipeline.open(path, "onnxruntime-cpu", verify=False, **options)  # type: ignore[arg-type]
        assert str(error.value) == message
    with pytest.raises(BundleError) as refused:
        Pipeline.open(path, "onnxruntime-cpu", verify=False, vae="tiny")
    cure = "export it again with one: vega-edge export MODEL -o BUNDLE --tiny-vae FOLDER"
    assert str(refused.value) == f"bundle {path} has no tiny decoder; {cure}"


def test_previews_come_from_the_tiny_decoder() -> None:
    options: dict[str, Any] = {"steps": 1, "seed": 1, "guidance": 0.0, "scheduler": "LCM"}
    full, tiny = (Pipeline.open("demo-vegart", "onnxruntime-cpu", vae=vae) for vae in ("full", "tiny"))
    picture, small = full(STAR, **options).images[0], tiny(STAR, **options).images[0]
    (step,) = full.stream(STAR, **options)
    assert np.array_equal(np.asarray(step.preview()[0]), np.asarray(small))
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(small))
    assert 0 < difference.mean() < 10  # of 255: the same picture, by another network


def test_auto_is_told_what_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT runs plans: of the decoders that are used, and of weights as the LoRAs leave them."""
    pytest.importorskip("safetensors")
    from vega_edge.bench.lora import random_lora

    asked: list[tuple[BuiltFor, str | None]] = []

    def choose(size: int, built: BuiltFor, device: str | None, precision: tuple[str, str]) -> str:
        asked.append((built, device))
        raise EngineError("that is all")

    monkeypatch.setattr(pipeline, "choose_engine", choose)
    plain, with_tiny = find_bundle("demo-vegart"), tmp_path / "bundle"
    shutil.copytree(plain / "vae_decoder", with_tiny / "tiny_vae_decoder")
    for part in ("vae_decoder", "unet"):
        shutil.copytree(plain / part, with_tiny / part)
    shutil.copyfile(plain / "model_index.json", with_tiny / "model_index.json")
    random_lora(Bundle.open(plain, verify=False), tmp_path / "lora.safetensors", rank=1)
    loras = [(tmp_path / "lora.safetensors", 1.0)]
    calls: list[tuple[Path, dict[str, Any]]] = [
        (plain, {"device": "cuda:1"}), (plain, {"loras": loras}), (with_tiny, {}), (with_tiny, {"vae": "tiny"})
    ]  # fmt: skip
    for bundle, options in calls:
        with pytest.raises(EngineError, match="that is all"):
            Pipeline.open(bundle, verify=False, **options)
    assert [(built.bundle, device) for built, device in asked] == [(b, o.get("device")) for b, o in calls]
    assert [set(built.unused) for built, _ in asked] == [set(), set(), set(), {"vae_decoder"}]
    assert [len(built.weights("unet")) for built, _ in asked[:2]] == [0, 233]


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 64), (40, 200), (129, 97), (7, 300)])
def test_tiles_of_a_local_decoder_are_the_whole(height: int, width: int) -> None:
    """A decoder that looks at single latents can be cut anywhere: every pixel must come out, and only once."""
    latents = np.random.default_rng(0).uniform(0, 255, (2, 4, height, width)).astype(np.float32)
    sizes: list[tuple[int, ...]] = []

    def decode(tile: np.ndarray) -> np.ndarray:
        sizes.append(tile.shape)
        return np.rint(tile[:, :3]).astype(np.uint8).repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)

    got = decode_in_tiles(latents, 8, decode)
    expected = np.rint(latents[:, :3]).astype(np.uint8).repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)
    assert np.array_equal(got, expected)
    assert set(sizes) == {(1, 4, min(height, 64), min(width, 64))}


def test_tiles_leave_no_seam() -> None:
    """Neighbouring tiles that disagree by 40 levels, as group norms may make them, meet in a ramp and not in an edge."""
    levels = iter([100, 140] * 20)
    got = decode_in_tiles(
        np.zeros((1, 4, 64, 160), np.float32), 8, lambda tile: np.full((1, 512, 512, 3), next(levels), np.uint8)
    )
    assert got.min() == 100 and got.max() == 140
    assert np.abs(np.diff(got.astype(int), axis=2)).max() <= 1


def test_large_pictures_are_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(find_bundle("demo-vegart"), verify=False)
    for engine, low, limit in (
        ("onnxruntime-cpu", False, 896),
        ("onnxruntime-cpu", True, 768),
        ("openvino", False, 1280),
    ):
        made = Decoder(Parts(bundle, engine, None, low))
        tiled: list[int] = []
        monkeypatch.setattr(decoder, "decode_in_tiles", lambda latents, *_: tiled.append(latents.shape[-1]))  # noqa: B023
        monkeypatch.setattr(made, "_decode", lambda engine, latents: np.zeros((len(latents), 8, 8, 3), np.uint8))
        for side in (limit // 8, limit // 8 + 8):
            made.pixels(np.zeros((1, 4, side, side), np.float32))
        assert tiled == [limit // 8 + 8]


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [
        (896, 896, None),
        (768, 1040, None),  # fewer pixels than 896x896
        (1024, 1024, (592, 1024)),
        (1024, 1536, (1024, 624)),
        (1344, 768, (768, 768)),
        (2048, 2048, (384, 2048)),
    ],
)
def test_bands_of_a_large_picture(height: int, width: int, tile: tuple[int, int] | None) -> None:
    """On onnxruntime's CPU provider: as few as take no more memory than 896x896 px, an eighth to a half more work."""
    assert TILING.tile("onnxruntime-cpu", False, height, width) == tile
    if tile:
        decoded: list[int] = []

        def decode(part: np.ndarray) -> np.ndarray:
            decoded.append(part.shape[2] * part.shape[3] * 64)
            return np.zeros((1, part.shape[2] * 8, part.shape[3] * 8, 3), np.uint8)

        decode_in_tiles(np.zeros((1, 4, height // 8, width // 8), np.float32), 8, decode, tile)
        assert max(decoded) <= 896**2
        assert sum(decoded) < 1.5 * height * width


# -- what is kept of compiling ----------------------------------------------------------------------------------------


def kept(cache: Path, *names: str, size: int = 100) -> None:
    """Folders in a cache, that used last first."""
    for age, name in enumerate(names):
        folder = cache / "engine-1" / name
        folder.mkdir(parents=True)
        (folder / "blob").write_bytes(b"x" * size)
        then = time.time() - 1000 * (age + 1)
        os.utime(folder, (then, then))


def names_in(cache: Path) -> list[str]:
    return sorted(folder.name for folder in cache.glob("*/*"))


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    kept(tmp_path, "new", "used", "old", "oldest")
    folder = tmp_path / "engine-1"
    compiled.used(folder / "oldest")
    assert [f.name for f in compiled.trim(tmp_path, 250)] == ["old", "used"]
    assert names_in(tmp_path) == ["new", "oldest"]
    assert [f.name for f in compiled.trim(tmp_path, 0, keep=folder / "new")] == ["oldest"]
    assert compiled.trim(tmp_path / "none", 0) == []


def test_room_is_made_before_something_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "400e-9")
    kept(tmp_path, "new", "used", "old", "oldest")
    coming = tmp_path / "engine-1" / "coming"
    assert compiled.has_room(coming, 100) and names_in(tmp_path) == ["new", "old", "used"]
    assert compiled.has_room(coming, 201) and names_in(tmp_path) == ["new"]


@pytest.mark.parametrize("even_needed", [False, True])
def test_what_is_larger_than_the_limit_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, even_needed: bool
) -> None:
    """And drives nothing else out. One line for all networks."""
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "0.1")
    kept(tmp_path, "one", "two")
    coming = tmp_path / "engine-1" / "coming"
    if even_needed:
        with pytest.raises(EngineError) as error:
            compiled.has_room(coming, 1_000_000, needed=200_000_000)  # or they would drive out each other
        assert str(error.value) == (
            f"{tmp_path} may hold 100 MB (VEGA_EDGE_CACHE_GB), and --memory low keeps 200 MB of these networks there; set "
            "VEGA_EDGE_CACHE_GB to more, or to 0 to do without, which takes more memory"
        )
    else:
        assert not compiled.has_room(coming, 200_000_000) and not compiled.has_room(coming, 300_000_000)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "may hold 100 MB (VEGA_EDGE_CACHE_GB), and this network takes 200 MB" in caplog.text
    assert names_in(tmp_path) == ["one", "two"]


def test_what_this_process_has_open_is_not_driven_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a pipeline that does not fit would drive out its own networks, and compile them all at every start."""
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "250e-9")
    kept(tmp_path, "other", "mine")

    class Open:
        pass

    engine = Open()
    compiled.opened(engine, tmp_path / "engine-1" / "mine")
    coming = tmp_path / "engine-1" / "coming"
    assert not compiled.has_room(coming, 200) and names_in(tmp_path) == ["mine", "other"]
    assert compiled.has_room(coming, 100) and names_in(tmp_path) == ["mine"]
    del engine
    assert compiled.has_room(coming, 200) and names_in(tmp_path) == []


def test_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VEGA_EDGE_CACHE_GB", raising=False)
    cache, free = tmp_path / "compiled", [500 * 10**9]
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert compiled.limit(cache) == compiled.Limit(10 * 10**9, "the default")
    free[0] = 50 * 10**9
    assert compiled.limit(cache) == compiled.Limit(5 * 10**9, "a tenth of the free disk")
    assert compiled.most_bytes(cache, 7) == 5 * 10**9 and compiled.most_bytes(cache, 6 * 10**9) == 6 * 10**9
    free[0] = 5000
    kept(cache, "one", size=5000)
    assert compiled.limit(cache).bytes == 1000  # the cache's own bytes count as free, or it would shrink as it fills
    assert compiled.trim(cache, compiled.limit(cache).bytes) == [cache / "engine-1" / "one"]
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "25")
    assert compiled.limit(cache) == compiled.Limit(25 * 10**9, "VEGA_EDGE_CACHE_GB", chosen=True)
    assert compiled.most_bytes(cache, 26 * 10**9) == 25 * 10**9  # what the user says counts


def test_what_killed_processes_left_half_made_is_removed(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder, host = tmp_path / "engine-1", socket.gethostname()
    for name in (f"a.{host}.{other.pid}.part", f"b.elsewhere.{other.pid}.part", "c.7.part"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_bytes(b"x" * 100)
    with compiled.making(folder / "mine") as mine:
        (mine / "weights").write_bytes(b"x")
        assert compiled.trim(tmp_path, 0) == []  # they may all be under way
        other.communicate(b"\n")
        gone = [f"a.{host}.{other.pid}.part"] if os.name == "posix" else []
        assert [f.name for f in compiled.trim(tmp_path, 10**9)] == gone
        for path in (folder / "b.elsewhere.1.part").parent.glob("[bc].*/weights"):
            os.utime(path, (1, 1))
            os.utime(path.parent, (1, 1))
        assert len(compiled.trim(tmp_path, 10**9)) == 2
    assert names_in(tmp_path) == ["mine"]


def test_nothing_goes_that_was_used_meanwhile(tmp_path: Path) -> None:
    kept(tmp_path, "new", "old")
    (old, _) = compiled.contents(tmp_path)
    compiled.used(old.folder)
    assert not compiled._remove(old) and names_in(tmp_path) == ["new", "old"]


def test_several_processes_make_and_remove_at_the_same_time(tmp_path: Path) -> None:
    """None fails, nothing is half there, and the limit is exceeded by what each is making at most."""
    program = f"""
from pathlib import Path
from vega_edge.engines import compiled
import sys
cache = Path({str(tmp_path)!r})
for n in range(60):
    folder = compiled.entry(cache, "engine", "1", f"{{sys.argv[1]}} {{n % 12}}")
    compiled.used(folder)
    if not folder.is_dir():
        assert compiled.has_room(folder, 1000)
        with compiled.making(folder) as part:
            (part / "blob").write_bytes(b"x" * 1000)
    held = sum(each.bytes for each in compiled.contents(cache) if not each.making)
    assert held <= 5000 + 3 * 1000, held
    compiled.trim(cache, 5000, keep=folder)
"""
    environment = {**os.environ, "VEGA_EDGE_CACHE_GB": "5000e-9"}
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(n)], env=environment, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for run in runs:
        assert run.communicate(timeout=120)[1] == "" and run.returncode == 0
    compiled.trim(tmp_path, 5000)
    left = compiled.contents(tmp_path)
    assert left and all((each.folder / "blob").stat().st_size == 1000 and not each.making for each in left)
    assert sum(each.bytes for each in left) <= 5000


def test_networks_of_little_memory_do_not_drive_out_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tenth of the free disk is less than they take, 19 MB: each picture would prepare all of them anew."""
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    monkeypatch.delenv("VEGA_EDGE_CACHE_GB", raising=False)
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000_000))
    kept(tmp_path / "compiled", "of another model", size=6_000_000)
    with Pipeline.open("demo-vegart", "onnxruntime-cpu", memory="low", verify=False) as pipe:
        pipe(STAR, steps=1, width=64, height=64)
        first = {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").glob("*/*/*")}
        pipe(STAR, steps=1, width=64, height=64)
    assert len({path.parent for path in first}) == 4
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").glob("*/*/*")}
    compiled.clear(tmp_path / "compiled")
    with pytest.raises(EngineError, match="may hold 16 MB"), monkeypatch.context() as patched:
        patched.setenv("VEGA_EDGE_CACHE_GB", "0.016")  # enough for each of them, and not for all
        Pipeline.open("demo-vegart", "onnxruntime-cpu", memory="low", verify=False)(STAR, steps=1)


def test_every_strength_of_a_lora_is_kept_for_itself_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On OpenVINO. The networks without a LoRA, which every run uses, stay."""
    if missing := missing_here("openvino"):
        pytest.skip(missing.why)
    pytest.importorskip("safetensors")
    from vega_edge.bench.lora import random_lora

    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "0.045")  # two U-Nets of 16.8 MB and the rest of 4.2 MB
    random_lora(Bundle.open(find_bundle("demo-vegart"), verify=False), tmp_path / "lora.safetensors", rank=1)
    used: list[set[str]] = []
    for strength in (1.0, 2.0, 3.0, 2.0):
        loras = [(tmp_path / "lora.safetensors", strength)]
        with Pipeline.open("demo-vegart", "openvino", loras=loras, verify=False) as pipe:
            assert pipe(STAR, steps=1, width=64, height=64).images
        there = compiled.contents(tmp_path / "compiled")
        assert sum(each.bytes for each in there) <= 45e6
        used.append({each.folder.name for each in there})
    assert [len(each) for each in used] == [4, 5, 5, 5]
    assert used[3] == used[2]  # strength 2 was still there, 1 was not


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "compiled"
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "0")
    assert cache_folder() is None
    for text in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("VEGA_EDGE_CACHE_GB", text)
        with pytest.raises(UsageError) as error:
            cache_folder()
        assert str(error.value) == f"VEGA_EDGE_CACHE_GB must be a number of gigabytes, 0 for no cache, got '{text}'"


def test_the_key_is_the_contents(tmp_path: Path) -> None:
    assert compiled.entry(tmp_path, "a", "1", "x") == compiled.entry(tmp_path, "a", "1", "x")
    others = {
        compiled.entry(tmp_path, e, v, i)
        for e, v, i in (("a", "1", "x"), ("b", "1", "x"), ("a", "2", "x"), ("a", "1", "y"))
    }
    assert len(others) == 4


@pytest.fixture(params=["full", "not a folder"])
def no_room(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """VEGA_EDGE_HOME where nothing can be kept, and what is said of its cache."""
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    for backend in ("onnxruntime", "openvino"):
        module = pytest.importorskip(f"vega_edge.engines.{backend}")
        monkeypatch.setattr(module, "prepared_bytes", lambda *_: 3 << 20)
    if request.param == "full":
        monkeypatch.setattr(compiled.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "1")
        return tmp_path, f"{tmp_path / 'compiled'} has only 1 MB free"
    (tmp_path / "compiled").write_text("")  # root may write where modes forbid it, but not into a file
    return tmp_path, f"{tmp_path / 'compiled'} can't be written (Not a directory)"


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_warned", set())


@pytest.mark.skipif(os.name == "nt", reason="another text of the system's")
@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
def test_without_room_little_memory_is_refused(engine: str, no_room: tuple[Path, str]) -> None:
    if missing := missing_here(engine):
        pytest.skip(missing.why)
    graph = find_bundle("demo-vegart") / "tiny_vae_decoder" / "model.onnx"
    with pytest.raises(EngineError) as error:
        open_engine(graph, engine, cache=cache_folder(), low_memory=True)
    assert str(error.value) == (
        f"engine {engine} can't open {graph}: {no_room[1]}, and --memory low keeps 4 MB of this network there; set "
        "VEGA_EDGE_HOME to a folder with room, or VEGA_EDGE_CACHE_GB=0 to do without, which takes more memory"
    )
    assert not [file for file in no_room[0].rglob("*") if file.is_file() and file.stat().st_size]


def test_without_room_nothing_is_kept(no_room: tuple[Path, str], caplog: pytest.LogCaptureFixture) -> None:
    """One warning for all networks."""
    if missing := missing_here("openvino"):
        pytest.skip(missing.why)
    pipe = Pipeline.open("demo-vegart", "openvino", verify=False)
    assert pipe("a star", steps=1, width=64, height=64).images
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{no_room[1]}: what is compiled is not kept, and compiled again next time; set VEGA_EDGE_HOME to a folder with "
        "room, or VEGA_EDGE_CACHE_GB=0"
    ]


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino", "openvino-bf16"])
def test_what_is_kept_of_a_network_is_about_as_large_as_was_thought(engine: str, tmp_path: Path) -> None:
    """OpenVINO keeps float32 for bf16, too."""
    if missing := missing_here(engine):
        pytest.skip(missing.why)
    graph = find_bundle("demo-vegart") / "unet" / "model.onnx"
    thought = compiled.prepared_bytes(graph)
    open_engine(graph, engine, cache=tmp_path, low_memory=True).close()
    (there,) = compiled.contents(tmp_path)
    assert 0.88 * there.bytes <= thought <= there.bytes


def test_generate_closes_its_pipeline_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends write what they compiled, and free a GPU's memory, when they are closed."""
    from vega_edge.cli import main

    closed: list[str] = []
    monkeypatch.setattr(Pipeline, "close", lambda self: closed.append(self.name))
    command = ["generate", "a star", "--engine", "onnxruntime-cpu", "--size", "64x64", "-o", str(tmp_path / "a.png")]
    assert main([*command, "--steps", "1"]) == 0
    assert main([*command, "--steps", "0", "--overwrite"]) == 2
    assert closed == ["demo-vegart"] * 2


def test_a_loras_weights_are_made_only_where_nothing_was_prepared_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory every network is opened anew for each picture."""
    pytest.importorskip("safetensors")
    from vega_edge.bench.lora import random_lora

    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    random_lora(Bundle.open(find_bundle("demo-vegart"), verify=False), tmp_path / "lora.safetensors", rank=1)
    made: list[str] = []
    plain = Patches.of
    monkeypatch.setattr(Patches, "of", lambda self, part: made.append(part) or plain(self, part))
    loras = [(tmp_path / "lora.safetensors", 4.0)]
    pipe = Pipeline.open("demo-vegart", "onnxruntime-cpu", loras=loras, memory="low", verify=False)
    options = {"steps": 1, "seed": 1, "width": 64, "height": 64}
    first = pipe(STAR, **options).latents
    assert made == ["unet"]
    assert np.array_equal(pipe(STAR, **options).latents, first)
    assert made == ["unet"]
    pipe.close()
    without = Pipeline.open("demo-vegart", "onnxruntime-cpu", verify=False)(STAR, **options).latents
    assert made == ["unet"] and not np.allclose(without, first, rtol=1e-2)


def test_a_folder_that_can_not_take_its_name_is_an_error_unless_another_process_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engine-1" / "entry"

    def faster(part: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(39, "Directory not empty")

    def broken(part: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        refused = pytest.raises(EngineError, match=r"entry can't be made \(Input/output error\); VEGA_EDGE_CACHE_GB=0")
        with refused, compiled.making(folder):
            pass
        assert list(folder.parent.iterdir()) == []
        patch.setattr(Path, "rename", faster)
        with compiled.making(folder):
            pass
    assert list(folder.parent.iterdir()) == [folder]


def test_a_prepared_network_that_another_process_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vega_edge.engines import onnxruntime as backend

    graph, plain, opened = find_bundle("demo-vegart") / "tiny_vae_decoder" / "model.onnx", backend._session, []

    def session(path: Any, *rest: Any) -> Any:
        opened.append(path)
        if len(opened) == 2:  # after the one that prepares
            shutil.rmtree(path.parent)
        return plain(path, *rest)

    monkeypatch.setattr(backend, "_session", session)
    engine = open_engine(graph, "onnxruntime-cpu", low_memory=True, cache=tmp_path)
    engine.close()
    assert len(opened) == 4 and opened[1] == opened[3] and opened[3].is_file()


def test_the_cache_needs_room_for_the_autoencoders_networks_that_are_used(tmp_path: Path) -> None:
    """What draws the previews and what reads a picture may never be opened."""
    made = Parts(Bundle.open(find_bundle("demo-vegart"), verify=False), "onnxruntime-cpu", None, True, tmp_path)
    decoder = made.part("tiny_vae_decoder/model.onnx")
    made.part("unet/model.onnx")
    unet, tiny = (made._sizes[part] for part in ("unet", "tiny_vae_decoder"))
    assert made._cache_needs() == int(1.1 * unet)
    with decoder.running():
        pass
    assert made._cache_needs() == int(1.1 * (unet + tiny))
