"""Plans on disk: hashes, locks, what is left of a build that was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vega_edge.bundle import describe_files, write_manifest
from vega_edge.engines import LazyWeights, plan_store
from vega_edge.engines.plan_choice import BuiltFor, Here, choose_plans, lacking
from vega_edge.engines.plan_store import INDEX, Plan, PlanLora, PlanStore, graph_hash
from vega_edge.errors import EngineError
from vega_edge.manifest import Manifest, Part, Source
from vega_edge.verbs import engines as verbs_engines

pytest.importorskip("filelock")
STYLE, INK = PlanLora("0", 1.0), PlanLora("1", 1.0)
RANGES = {"sample": ((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))}


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    for part, name in (("unet", "model.onnx"), ("vae_decoder", "pixels.onnx"), ("vae_decoder", "model.onnx")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_bytes(f"{part} {name}".encode())
    (folder / "unet" / "model.onnx_data").write_bytes(b"weights")
    return folder


@pytest.fixture
def store(bundle):
    return PlanStore(bundle)


def plan(bundle, graph="unet/model.onnx", **changes):
    return dataclasses.replace(
        Plan("", "", 0, graph, graph_hash(bundle / graph), "tensorrt-rtx", "1.7", ("ampere+",), RANGES), **changes
    )


def refused(call, *args):
    with pytest.raises(EngineError) as caught:
        call(*args)
    return str(caught.value)


def test_what_is_added_is_read(store, bundle):
    added = store.add(plan(bundle), b"plan", 1.234)
    assert store.folder == bundle.with_name("bundle.engines")
    assert (added.file, added.bytes, added.seconds) == (f"unet.model.{added.key[:16]}.tensorrt-rtx.plan", 4, 1.23)
    assert store.plans() == (added,)
    assert store.read(added) == b"plan"
    again = store.add(plan(bundle), b"other plan", 1)
    assert store.plans() == (again,)
    assert store.read(again) == b"other plan"


def test_the_key_covers_what_makes_a_plan_another(bundle):
    one = plan(bundle)
    others = [
        {"graph_hash": "0"}, {"library": "tensorrt"}, {"version": "1.6"}, {"targets": ("sm_75",)}, {"profile": {}},
        {"precision": "int8"}, {"flags": ("static",)}, {"graph": "unet/other.onnx"},
        {"loras": (STYLE,)}, {"loras": (INK,)}, {"loras": (PlanLora("0", 0.5),)}, {"loras": (STYLE, INK)}, {"loras": (INK, STYLE)},
    ]  # fmt: skip
    keys = {dataclasses.replace(one, **other).key for other in others}
    assert len(keys | {one.key}) == len(others) + 1
    same = dataclasses.replace(one, seconds=3.0, file="x", bytes=3, sha256="0", unit_px=8, pictures=(1, 1, 4))
    assert same.key == one.key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"pl"), "{path} is truncated (2 of 4 bytes); {cure}"),
        (
            lambda p: p.write_bytes(b"evil"),
            "{path} is not the engine that was built here (sha256 d7c1d14e3a2d, engines.json says 0d11b08ae3b3) and is "
            "not loaded, because an engine is code; {cure}",
        ),
        (lambda p: p.unlink(), "{path} can't be read (No such file or directory); {cure}"),
    ],
)
def test_a_plan_that_is_not_what_was_built_is_not_loaded(store, bundle, damage, message):
    added = store.add(plan(bundle), b"plan", 0)
    path = store.folder / added.file
    damage(path)
    cure = f"build it again: vega-edge build {bundle} --engine tensorrt-rtx --part unet"
    message = message.replace("d7c1d14e3a2d", hashlib.sha256(b"evil").hexdigest()[:12])
    message = message.replace("0d11b08ae3b3", hashlib.sha256(b"plan").hexdigest()[:12])
    assert refused(store.read, added) == message.format(path=path, cure=cure)


def test_a_plan_that_nobody_listed_is_not_seen(store, bundle):
    added = store.add(plan(bundle), b"plan", 0)
    (store.folder / "unet.model.0.tensorrt-rtx.plan").write_bytes(b"from elsewhere")
    assert store.plans() == (added,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"format": 2}', "format 2 is not 1, the one this version reads"),
        ('{"format": 1, "plan": []}', "unknown key 'plan'; known keys: format, plans"),
    ],
)
def test_a_damaged_manifest(store, bundle, text, why):
    store.add(plan(bundle), b"plan", 0)
    (store.folder / INDEX).write_text(text)
    cure = f"remove {store.folder} and build again"
    assert refused(store.plans) == f"{store.folder / INDEX}: {why}; {cure}"


def test_a_listed_name_stays_in_the_folder(store, bundle):
    store.add(plan(bundle), b"plan", 0)
    index = json.loads((store.folder / INDEX).read_text())
    index["plans"][0]["file"] = "../evil.plan"
    (store.folder / INDEX).write_text(json.dumps(index))
    assert "'../evil.plan' is not the name of a file in this folder" in refused(store.plans)


def test_removing(store, bundle):
    one, two = store.add(plan(bundle), b"1", 0), store.add(plan(bundle, flags=("static",)), b"2", 0)
    store.remove((one,))
    assert store.plans() == (two,)
    assert not (store.folder / one.file).exists()


def test_what_a_killed_build_left_is_found_but_not_what_is_being_written(store, bundle):
    added = store.add(plan(bundle), b"plan", 0)
    old, new = store.folder / ".x.plan.1.part", store.folder / ".y.plan.2.part"
    for path in (old, new, store.folder / "unlisted.plan"):
        path.write_bytes(b"half")
    for path in (old, store.folder / "unlisted.plan", store.folder / added.file):
        os.utime(path, (time.time() - 3600,) * 2)
    assert store.stray() == [old, store.folder / "unlisted.plan"]


def test_a_plan_of_another_export_is_of_no_use(store, bundle):
    added = store.add(plan(bundle), b"plan", 0)
    assert store.fault(added) == ""
    (bundle / "unet" / "model.onnx_data").write_bytes(b"others")
    assert store.fault(added) == "unet/model.onnx has changed since"
    (bundle / "unet" / "model.onnx").unlink()
    assert store.fault(added) == "the bundle has no unet/model.onnx"
    (store.folder / added.file).unlink()
    assert store.fault(added) == "its file is missing"


def test_a_folder_that_cannot_be_made(bundle, monkeypatch):
    (bundle.parent / "file").write_text("")
    monkeypatch.setenv("VEGA_EDGE_ENGINES", str(bundle.parent / "file"))
    store = PlanStore(bundle)
    assert refused(store.write, store.folder / "x", b"") == (
        f"{store.folder} can't be made (Not a directory); copy the bundle to a folder of yours, or set "
        "VEGA_EDGE_ENGINES to one where engines may be kept"
    )


def test_bundles_of_one_name_do_not_share_a_folder(bundle, monkeypatch, tmp_path, capsys):
    """Else `engines gc` on the one would take the other's plans away, as of another export."""
    from vega_edge.cli import main

    monkeypatch.setenv("VEGA_EDGE_ENGINES", str(tmp_path / "kept"))
    monkeypatch.setattr(verbs_engines, "_installed", dict)
    other = tmp_path / "elsewhere" / bundle.name
    shutil.copytree(bundle, other)
    (other / "unet" / "model.onnx").write_bytes(b"another export")
    added = [PlanStore(each).add(plan(each), b"plan", 0) for each in (bundle, other)]
    assert main(["engines", "gc", str(other)]) == 0
    assert [PlanStore(each).plans() for each in (bundle, other)] == [(added[0],), (added[1],)]
    monkeypatch.chdir(bundle.parent)
    assert PlanStore(Path(bundle.name)).plans() == (added[0],)
    assert PlanStore(bundle).folder.parent == tmp_path / "kept"


def test_engines_that_came_with_the_bundle_are_found_wherever_new_ones_go(bundle, monkeypatch, tmp_path, capsys):
    """Built without a GPU on one machine, copied with the bundle, run in a container that writes elsewhere."""
    from vega_edge.cli import main

    shipped = PlanStore(bundle).add(plan(bundle), b"shipped", 0)
    monkeypatch.setenv("VEGA_EDGE_ENGINES", str(tmp_path / "kept"))
    store = PlanStore(bundle)
    assert store.plans() == (shipped,) and bytes(store.read(shipped)) == b"shipped"
    assert chosen(store, ADA).plan == shipped
    added = store.add(plan(bundle, flags=("static",)), b"own", 0)
    assert (store.plans(), store.own()) == ((added, shipped), (added,))
    assert (store.path(added).parent, store.path(shipped).parent) == (store.folder, store.beside)
    assert main(["engines", "ls", str(bundle)]) == 0
    told = capsys.readouterr()
    assert told.out.count("\n") == 2 and f"2 engines, 0.0 MB in {store.folder} and {store.beside}" in told.err
    (bundle / "unet" / "model.onnx").write_bytes(b"another export")
    monkeypatch.setattr(verbs_engines, "_installed", dict)
    assert main(["engines", "gc", str(bundle)]) == 0  # what it did not write it does not remove
    assert (store.plans(), store.path(shipped).is_file()) == ((shipped,), True)


def test_an_altered_engine_that_came_with_the_bundle_is_not_loaded(bundle, monkeypatch, tmp_path):
    shipped = PlanStore(bundle).add(plan(bundle), b"shipped", 0)
    monkeypatch.setenv("VEGA_EDGE_ENGINES", str(tmp_path / "kept"))
    store = PlanStore(bundle)
    (store.beside / shipped.file).write_bytes(b"altered")
    assert "is not the engine that was built here" in refused(store.read, shipped)
    (store.beside / "engines.json").unlink()
    assert store.plans() == ()


@pytest.mark.parametrize("first", ["graph", "int8", "fp8"])
def test_fewer_bits_are_not_taken_where_there_are_all(store, bundle, first):
    """Whichever was built last: nobody loses precision by a file's time."""
    order = [first, *({"graph", "int8", "fp8"} - {first})]
    added = {each: store.add(plan(bundle, precision=each), b"plan", 0) for each in order}
    for i, each in enumerate(order):
        os.utime(store.path(added[each]), (1e9 + i, 1e9 + i))
    found = choose_plans(store, bundle / "unet" / "model.onnx", ADA, {})
    assert [each.plan.precision for each in found] == ["graph", *(p for p in reversed(order) if p != "graph")]


def test_many_processes_list_their_plans_at_once(store, bundle):
    """Without the lock, one would write back a manifest that it read before another's was there."""
    code = (
        "import sys; from pathlib import Path; from vega_edge.engines.plan_store import *\n"
        "b = Path(sys.argv[1]); s = PlanStore(b)\n"
        "for i in range(15): s.add(Plan('', '', 0, 'unet/model.onnx', sys.argv[2] + str(i), 'tensorrt', '1', (), {}), b'x', 0)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(bundle), str(n)]) for n in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(store.plans()) == 45
    assert len(list(store.folder.glob("*.plan"))) == 45


def test_a_lock_ends_with_its_process(store):
    code = (
        "import sys, os; from pathlib import Path; from vega_edge.engines.plan_store import *\n"
        "with PlanStore(Path(sys.argv[1])).lock('key'):\n    print('held', flush=True); os._exit(9)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(store.bundle)], capture_output=True, text=True)
    assert (child.stdout, child.returncode) == ("held\n", 9)
    with store.lock("key"):
        pass


# which one runs here

ADA = Here("tensorrt-rtx", "1.7", "sm_89", frozenset({"sm_75", "sm_86", "sm_89"}))
ORIN = dataclasses.replace(ADA, capability="sm_87")


def not_made():
    raise AssertionError("made")


def with_loras(*loras):
    """Weights that nobody may look at: making those of a large network takes tens of seconds."""
    return LazyWeights(not_made, tuple((lora.sha256, lora.strength) for lora in loras))


LORA = with_loras(STYLE)


def chosen(store, here=ADA, weights=None):
    return choose_plans(store, store.bundle / "unet" / "model.onnx", here, weights or {})[0]


@pytest.mark.parametrize(
    ("changes", "here", "why", "part"),
    [
        (None, ADA, "none has been built", ""),
        ({"version": "1.6"}, ADA, "the one there is of tensorrt-rtx 1.6, and this is 1.7", ""),
        ({"targets": ("sm_89",)}, ORIN, "the one there is built for sm_89, and this GPU is sm_87", ""),
        ({"graph_hash": "0"}, ADA, "the one there is of another export of the bundle", " --part unet"),
        ({"loras": (INK,)}, ADA, "the one there is built with another LoRA", " --part unet"),
    ],
)
def test_why_none_fits(store, bundle, changes, here, why, part):
    """All parts are to be built where no part has a plan for this library and GPU: else each run would name the next."""
    if changes is not None:
        store.add(plan(bundle, **changes), b"plan", 0)
    command = f"vega-edge build {bundle} --engine tensorrt-rtx{part}"
    assert refused(chosen, store, here) == f"no engine of unet/model.onnx can be used here: {why}; run: {command}"


@pytest.mark.parametrize(
    ("capability", "fits"), [("sm_89", True), ("sm_75", False), ("sm_90", False), ("sm_87", False)]
)
def test_one_for_all_rtx_gpus_is_not_for_turing_hopper_or_orin(store, bundle, capability, fits):
    store.add(plan(bundle), b"plan", 0)
    here = dataclasses.replace(ADA, capability=capability)
    if fits:
        assert chosen(store, here).plan == store.plans()[0]
    else:
        assert f"built for ampere+, and this GPU is {capability}" in refused(chosen, store, here)


TURING = dataclasses.replace(ADA, capability="sm_75")
EXTRAS = ("refit", "static", "stripped", "weight-streaming")


@pytest.mark.parametrize(
    ("changes", "here", "options"),
    [
        ({}, TURING, "--target sm_75"),
        (None, TURING, "--target sm_75"),
        ({"precision": "int8"}, TURING, "--target sm_75"),  # TensorRT-RTX has no int8 there
        ({"version": "1.6", "targets": ("sm_75",)}, TURING, "--target sm_75"),
        ({"version": "1.6", "targets": ("sm_75",)}, ADA, ""),
        ({"version": "1.6", "flags": EXTRAS}, ADA, "--refit --static --stripped --weight-streaming"),
        ({"version": "1.6", "precision": "int8"}, ADA, "--precision int8"),
        ({"version": "1.6", "precision": "fp8", "targets": ("sm_89",)}, ADA, "--precision fp8 --target sm_89"),
        ({"precision": "fp8", "targets": ("sm_120",)}, ADA, "--precision fp8 --target sm_89"),
        ({"precision": "fp8", "targets": ("sm_89",)}, dataclasses.replace(ADA, capability="sm_86"), "--target sm_86"),
        ({"version": "1.6", "targets": ("sm_86", "sm_89")}, ADA, "--target sm_86 --target sm_89"),
        ({"library": "tensorrt", "version": "10.3", "targets": ("sm_75",), "flags": ("static",), "precision": "int8"}, Here("tensorrt", "10.4", "sm_75"), "--static --precision int8"),
    ],
)  # fmt: skip
def test_what_is_told_to_be_run_builds_the_like_for_this_gpu(store, bundle, changes, here, options):
    if changes is not None:
        store.add(plan(bundle, **changes), b"plan", 0)
    command = f"vega-edge build {bundle} --engine {here.library} {options}".rstrip()
    assert refused(chosen, store, here).endswith(f"; run: {command}")


def test_what_widens_a_plan_builds_the_like(store, bundle):
    store.add(plan(bundle, flags=("static", "weight-streaming"), targets=("sm_89",), pictures=(1, 1, 4)), b"plan", 0)
    found = chosen(store).rebuild
    assert (
        found.command == f"vega-edge build {bundle} --engine tensorrt-rtx --part unet --weight-streaming --target sm_89"
    )
    assert (found.pictures, found.static) == ((1, 1, 4), True)


def test_one_part_is_built_where_another_has_a_plan(store, bundle):
    store.add(plan(bundle, "vae_decoder/pixels.onnx", library="tensorrt"), b"plan", 0)
    assert refused(chosen, store).endswith(f"; run: vega-edge build {bundle} --engine tensorrt-rtx")
    store.add(plan(bundle, "vae_decoder/pixels.onnx"), b"plan", 0)
    assert refused(chosen, store).endswith(f"; run: vega-edge build {bundle} --engine tensorrt-rtx --part unet")


def test_of_several_plans_the_last_built_ones_fault_is_told(store, bundle):
    other = store.add(plan(bundle, graph_hash="0"), b"plan", 0)
    old = store.add(plan(bundle, version="1.6"), b"plan", 0)
    for newest, why in ((other, "of another export of the bundle"), (old, "of tensorrt-rtx 1.6, and this is 1.7")):
        for each in (other, old):
            os.utime(store.folder / each.file, (2e9, 2e9) if each is newest else (1e9, 1e9))
        assert f"the one there is {why}; run: " in refused(chosen, store)


def test_a_plan_of_a_later_revision_takes_the_place_of_the_earlier(store, bundle):
    """It is the same to whoever asks for one, but another file: the earlier may be loaded now."""
    earlier, static = (store.add(plan(bundle, flags=flags), b"old", 0) for flags in ((), ("static",)))
    later = store.add(plan(bundle, revision=1), b"new", 0)
    assert later.key != earlier.key
    assert {each.file for each in store.plans()} == {later.file, static.file}
    assert (store.folder / earlier.file).is_file()  # until gc: see `stray`


def test_a_lora_needs_a_plan_built_with_it_or_one_that_can_be_refitted(store, bundle):
    plain = store.add(plan(bundle), b"plan", 0)
    assert refused(chosen, store, ADA, LORA).endswith(
        f"the one there is built without this LoRA; run: vega-edge build {bundle} --engine tensorrt-rtx --part unet "
        "--lora FILE:STRENGTH"
    )
    refit = store.add(plan(bundle, flags=("refit",)), b"refit", 0)
    assert (chosen(store, ADA, LORA).plan, chosen(store, ADA, LORA).refit) == (refit, True)
    built = store.add(plan(bundle, loras=(STYLE,)), b"lora", 0)
    os.utime(store.folder / built.file, (1e9, 1e9))  # though it is older: refitting takes seconds
    assert (chosen(store, ADA, LORA).plan, chosen(store, ADA, LORA).refit) == (built, False)
    assert chosen(store).plan in (plain, refit)


@pytest.mark.parametrize(("flags", "takes"), [(("stripped",), False), (("refit", "stripped"), True)])
def test_a_stripped_plan_takes_other_weights_only_if_it_was_built_for_that(store, bundle, flags, takes):
    store.add(plan(bundle, flags=flags), b"plan", 0)
    assert chosen(store).refit is False
    if takes:
        assert chosen(store, ADA, LORA).refit is True
    else:
        assert "the one there is built without this LoRA" in refused(chosen, store, ADA, LORA)


@pytest.mark.parametrize(
    "others", [(INK,), (PlanLora("0", 0.5),), (STYLE, INK), (INK, STYLE)], ids=["file", "strength", "one more", "order"]
)
def test_a_plan_is_known_by_its_loras_strengths_and_their_order(store, bundle, others):
    store.add(plan(bundle, loras=others), b"others", 0)
    assert "the one there is built with another LoRA" in refused(chosen, store, ADA, LORA)
    built = store.add(plan(bundle, loras=(STYLE,)), b"lora", 0)
    assert (chosen(store, ADA, LORA).plan, chosen(store, ADA, with_loras(*others)).plan.loras) == (built, others)


def test_weights_of_nobody_knows_what_need_a_plan_that_can_be_refitted(store, bundle):
    store.add(plan(bundle), b"plan", 0)
    weights = {"w": np.float32([1])}
    assert "the one there is built without this LoRA" in refused(chosen, store, ADA, weights)
    refit = store.add(plan(bundle, flags=("refit",)), b"refit", 0)
    assert (chosen(store, ADA, weights).plan, chosen(store, ADA, weights).refit) == (refit, True)


def test_an_altered_plan_is_not_loaded_after_the_whole_one_was(store, bundle):
    added = store.add(plan(bundle), b"plan", 0)
    assert store.read(added) == b"plan"
    (store.folder / added.file).write_bytes(b"evil")
    assert "is not the engine that was built here" in refused(store.read, added)


def test_the_plans_that_fit_come_in_order(store, bundle):
    first, second = (store.add(plan(bundle, flags=flags), b"plan", 0) for flags in ((), ("static",)))
    store.add(plan(bundle, version="1.6"), b"plan", 0)
    os.utime(store.folder / first.file, (1e9, 1e9))
    graph = bundle / "unet" / "model.onnx"
    assert [each.plan for each in choose_plans(store, graph, ADA, {})] == [second, first]


def test_a_plan_built_with_one_lora_is_refitted_for_no_other(store, bundle):
    """The weights that the one changed and the other does not would stay."""
    store.add(plan(bundle, flags=("refit",), loras=(STYLE,)), b"lora", 0)
    assert chosen(store, ADA, LORA).refit is False
    for weights in (with_loras(INK), {}):
        assert "the one there is built with another LoRA; run: " in refused(chosen, store, ADA, weights)


def test_the_last_built_is_taken(store, bundle):
    first, second = (store.add(plan(bundle, flags=flags), b"plan", 0) for flags in ((), ("static",)))
    os.utime(store.folder / first.file, (1e9, 1e9))
    assert chosen(store).plan == second
    os.utime(store.folder / second.file, (9e8, 9e8))
    assert chosen(store).plan == first


def test_every_graph_needs_one(store, bundle):
    store.add(plan(bundle), b"plan", 0)
    assert lacking(BuiltFor(bundle), ADA) == (
        "no engine of vae_decoder/pixels.onnx can be used here: none has been built; "
        f"run: vega-edge build {bundle} --engine tensorrt-rtx --part vae_decoder"
    )
    store.add(plan(bundle, "vae_decoder/pixels.onnx"), b"plan", 0)
    assert lacking(BuiltFor(bundle), ADA) == ""


def test_the_tiny_decoder_needs_one_too_and_a_decoder_that_does_not_run_needs_none(store, bundle):
    (bundle / "tiny_vae_decoder").mkdir()
    (bundle / "tiny_vae_decoder" / "pixels.onnx").write_bytes(b"tiny")
    for graph in ("unet/model.onnx", "vae_decoder/pixels.onnx"):
        store.add(plan(bundle, graph), b"plan", 0)
    assert lacking(BuiltFor(bundle), ADA) == (
        "no engine of tiny_vae_decoder/pixels.onnx can be used here: none has been built; "
        f"run: vega-edge build {bundle} --engine tensorrt-rtx --part tiny_vae_decoder"
    )
    store.add(plan(bundle, "tiny_vae_decoder/pixels.onnx"), b"plan", 0)
    assert lacking(BuiltFor(bundle), ADA) == ""
    store.remove(tuple(p for p in store.plans() if p.graph.startswith("vae_decoder")))
    assert "vae_decoder/pixels.onnx" in lacking(BuiltFor(bundle), ADA)
    assert lacking(BuiltFor(bundle, frozenset({"vae_decoder"})), ADA) == ""


def test_with_a_lora_its_plan_is_the_one_that_is_needed(store, bundle):
    store.add(plan(bundle, "vae_decoder/pixels.onnx"), b"plan", 0)
    store.add(plan(bundle, loras=(STYLE,)), b"lora", 0)
    with_lora = BuiltFor(bundle, weights=lambda part: LORA if part == "unet" else {})
    assert lacking(with_lora, ADA) == ""
    assert "the one there is built with another LoRA" in lacking(BuiltFor(bundle), ADA)


def test_the_copies_of_a_killed_build_are_cleaned_up_but_not_those_of_one_under_way(store, bundle, capsys, monkeypatch):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", dict)
    store.add(plan(bundle), b"plan", 0)
    with store.building("now") as under_way:
        for folder in (under_way, store.folder / ".build-killed-x", store.folder / ".build-0123-x"):
            (folder / "unet").mkdir(parents=True)
            (folder / "unet" / "model.onnx_data").write_bytes(b"x" * 1_500_000)
        (store.folder / ".killed.lock").touch()  # whose process died
        assert main(["engines", "gc", str(bundle)]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == [".build-0123-x", ".build-killed-x"]
        assert err == f"2 files, 3.0 MB removed from {store.folder}\n"
        assert list(store.folder.glob(".build-*")) == [under_way]
    assert not list(store.folder.glob(".build-*"))
    assert len(store.plans()) == 1


def test_who_builds_the_same_plan_again_finds_nothing_of_a_killed_build(store):
    left, others = store.folder / ".build-abc-x", store.folder / ".build-def-x"
    left.mkdir(parents=True)
    others.mkdir()
    with store.building("abc") as folder:
        assert sorted(store.folder.glob(".build-*")) == sorted([folder, others])


@pytest.mark.parametrize(
    ("damage", "fault", "left"),
    [
        (lambda p: p.write_bytes(b"pl"), "truncated, 2 of 4 bytes", "1 files, 0.0 MB removed from {folder}"),
        (lambda p: p.write_bytes(b"evil"), "altered since it was built", "1 files, 0.0 MB removed from {folder}"),
        (lambda p: p.write_bytes(b"p" * 3_000_000), "altered since it was built", "1 files, 3.0 MB removed from {folder}"),
        (lambda p: p.unlink(), "its file is missing", "0 files, 0.0 MB removed from {folder}; 1 more were listed, and missing"),
    ],
)  # fmt: skip
def test_damaged_plans_are_marked_and_cleaned_up(store, bundle, monkeypatch, capsys, damage, fault, left):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", dict)
    kept, added = store.add(plan(bundle, flags=("static",)), b"plan", 0), store.add(plan(bundle), b"plan", 0)
    assert main(["engines", "ls", str(bundle)]) == 0
    assert "(" not in capsys.readouterr().out
    damage(store.folder / added.file)
    assert main(["engines", "ls", str(bundle)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith(")")]
    assert line.startswith(added.file) and line.endswith(f"  ({fault})")
    assert main(["engines", "gc", str(bundle)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{added.file}\n", f"{left.format(folder=store.folder)}\n")
    assert store.plans() == (kept,)
    assert not (store.folder / added.file).exists()


def test_another_versions_plans_are_marked(store, bundle, monkeypatch, capsys):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", lambda: {"tensorrt-rtx": "1.8"})
    store.add(plan(bundle), b"plan", 0)
    for options in ([], ["--json"]):
        assert main(["engines", "ls", str(bundle), *options]) == 0
        assert "of tensorrt-rtx 1.7, and 1.8 is installed" in capsys.readouterr().out


def test_a_part_that_the_manifest_does_not_list_is_read(bundle):
    """A folder that was put beside the listed ones must not end in a traceback."""
    listed = {part: Part(describe_files(bundle, part)) for part in ("unet", "vae_decoder")}
    (bundle / "model_index.json").write_text("{}")
    listed["config"] = Part(describe_files(bundle, "config"))
    write_manifest(bundle, Manifest("x", "test", "fp32", "fp32", Source("x"), {}, {}, listed))
    (bundle / "tiny_vae_decoder").mkdir()
    graph = bundle / "tiny_vae_decoder" / "model.onnx"
    graph.write_bytes(b"one")
    first = graph_hash(graph)
    graph.write_bytes(b"two")
    assert len(first) == 64 and graph_hash(graph) != first


def test_gc_removes_what_an_update_left(store, bundle, monkeypatch, capsys):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", lambda: {"tensorrt-rtx": "1.7", "tensorrt": "10.3.0"})
    kept = store.add(plan(bundle), b"plan", 0)
    old = store.add(plan(bundle, version="1.6"), b"plan", 0)
    files = {
        "tensorrt-10.3.0-sm_87.timing": 0, "tensorrt-8.6.1-sm_87.timing": 0, ".0123.lock": 90_000, ".4567.lock": 3600,
        f".{INDEX}.lock": 90_000,
    }  # fmt: skip
    for name, age_s in files.items():
        (store.folder / name).touch()
        os.utime(store.folder / name, (time.time() - age_s,) * 2)
    assert main(["engines", "gc", str(bundle)]) == 0
    assert capsys.readouterr().out.splitlines() == [old.file, ".0123.lock", "tensorrt-8.6.1-sm_87.timing"]
    assert store.plans() == (kept,)
    assert {path.name for path in store.folder.iterdir()} == {
        INDEX, kept.file, "tensorrt-10.3.0-sm_87.timing", ".4567.lock", f".{INDEX}.lock",
    }  # fmt: skip


def test_gc_keeps_plans_of_a_library_that_is_not_here(store, bundle, monkeypatch, capsys):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", dict)
    added = store.add(plan(bundle, version="1.6"), b"plan", 0)
    assert main(["engines", "gc", str(bundle)]) == 0
    assert store.plans() == (added,)


def test_gc_leaves_what_was_built_again_meanwhile(store, bundle):
    """Under its old name: gc may take a while to read the other engines."""
    old = store.add(plan(bundle), b"plan", 0)
    new = store.add(plan(bundle), b"plan, built again", 1)
    assert new.file == old.file
    store.remove((old,))
    assert store.plans() == (new,)
    assert store.read(new) == b"plan, built again"


def test_gc_beside_a_process_that_renames_what_it_wrote(store, bundle, monkeypatch):
    store.add(plan(bundle), b"plan", 0)
    (store.folder / ".1-x.part").touch()
    real = Path.stat

    def stat(path, **how):
        if path.name.endswith(".part"):
            raise FileNotFoundError(2, "gone", str(path))
        return real(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    assert store.stray() == []


def test_an_engine_that_can_not_be_read_is_said_to_be_of_no_use(store, bundle, monkeypatch):
    added = store.add(plan(bundle), b"plan", 0)

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plan_store, "known_sha256", refused)
    assert store.fault(added) == "can't be read (Permission denied)"


@pytest.mark.parametrize("with_manifest", [True, False])
def test_what_a_file_manager_leaves_beside_a_graph_is_nothing_to_its_engines(tmp_path, with_manifest):
    from vega_edge.manifest import MANIFEST
    from vega_edge.models import recipes

    bundle = Path(shutil.copytree(recipes()["demo-vegart"].bundle_path, tmp_path / "demo"))
    if not with_manifest:
        (bundle / MANIFEST).unlink()
    graph = bundle / "unet" / "model.onnx"
    before = graph_hash(graph)
    for name in (".DS_Store", "._model.onnx_data", "Thumbs.db"):
        (graph.parent / name).write_bytes(b"?")
    (graph.parent / "folder").mkdir()
    assert graph_hash(graph) == before
    if not with_manifest:
        with open(graph.parent / "model.onnx_data", "r+b") as stream:
            stream.write(b"other weights")
        assert graph_hash(graph) != before


def test_engines_lie_beside_the_bundle_however_it_is_named(bundle, monkeypatch, tmp_path):
    beside = tmp_path / "bundle.engines"
    (tmp_path / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle / "unet")
    for name in ("..", "../../bundle", str(tmp_path / "link"), "../../link"):
        assert (PlanStore(Path(name)).folder, PlanStore(Path(name)).beside) == (beside, beside)


def test_a_folder_of_engines_that_can_not_be_written_is_one_line(store, bundle, monkeypatch):
    added = store.add(plan(bundle), b"plan", 0)

    def refused(self, *args, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(EngineError) as caught:
        store.remove((added,))
    assert str(caught.value) == (
        f"{store.folder} can't be written to (Read-only file system); copy the bundle to a folder of yours, or set "
        "VEGA_EDGE_ENGINES to one where engines may be kept"
    )


def test_an_engine_whose_copy_was_not_finished_is_passed_over(store, bundle):
    graph = bundle / "unet" / "model.onnx"
    good = store.add(plan(bundle, targets=("sm_89",)), b"plan", 0)
    half = store.add(plan(bundle), b"plan", 0)
    store.path(half).write_bytes(b"pl")
    assert [each.plan for each in choose_plans(store, graph, ADA, {})] == [good]
    store.path(good).unlink()
    told = refused(choose_plans, store, graph, ADA, {})
    assert ": the one there is listed, but truncated, 2 of 4 bytes; run: vega-edge build" in told


@pytest.mark.parametrize("action", ["ls", "gc"])
def test_only_rm_takes_files(bundle, store, capsys, action):
    from vega_edge.cli import main

    store.add(plan(bundle, version="1.6"), b"plan", 0)
    assert main(["engines", action, str(bundle), "one.plan"]) == 2
    assert capsys.readouterr().err == (
        f"vega-edge: engines {action} takes no files; to remove some: engines rm BUNDLE FILE ...\n"
    )
    assert len(store.plans()) == 1


def test_rm_and_gc_say_what_they_removed_as_json(bundle, store, capsys, monkeypatch):
    from vega_edge.cli import main

    monkeypatch.setattr(verbs_engines, "_installed", lambda: {"tensorrt-rtx": "1.7"})
    old, kept = store.add(plan(bundle, version="1.6"), b"plan", 0), store.add(plan(bundle), b"plan", 0)
    assert main(["engines", "gc", "--json", str(bundle)]) == 0
    assert json.loads(capsys.readouterr().out) == [old.file]
    assert main(["engines", "rm", "--json", str(bundle), kept.file]) == 0
    assert json.loads(capsys.readouterr().out) == [kept.file]


def test_engines_of_what_is_no_bundle(tmp_path, capsys):
    from vega_edge.cli import main

    assert main(["engines", "ls", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"vega-edge: {tmp_path} is not a bundle: it has no model_index.json; ")
