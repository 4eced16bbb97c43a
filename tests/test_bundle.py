"""Bundles on disk: written, opened, and every way in which one can be wrong, with its whole message."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from vega_edge import bundle as bundles
from vega_edge import records
from vega_edge.bundle import Bundle, FileEntry, Lora, Manifest, Parameter, Part, Source, describe_files, write_manifest
from vega_edge.errors import BundleError

AGAIN = "copy or export the bundle again"
MAKE = "check the path, or make one: vega-edge export MODEL -o BUNDLE"
FILES = {
    "model_index.json": '{"_class_name": "StableDiffusionXLPipeline", "unet": ["d", "X"], "scheduler": ["d", "Y"]}',
    "unet/config.json": '{"in_channels": 4}',
    "unet/model.onnx": "the graph",
    "unet/model.onnx_data": "the weights",
    "scheduler/scheduler_config.json": '{"beta_start": 0.00085}',
    "tokenizer/vocab.json": "{}",
}


def fill(folder, files=FILES):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def manifest_of(folder, **changes):
    parts = {part: Part(describe_files(folder, part)) for part in ("config", "scheduler", "tokenizer", "unet")}
    parts["unet"] = Part(parts["unet"].files, 1.5e-6, {"conv_in.weight": Parameter("val_7", True)})
    facts = {
        "name": "demo",
        "created_by": "vega-edge 0.1.0",
        "dtype": "fp32",
        "weights": "fp16",
        "source": Source("demo-vega", (Lora("lora.safetensors", "ab" * 32, 0.8),), "tiny"),
        "defaults": {"steps": 4, "guidance": 0.0, "scheduler": "LCM"},
        "limits": {"steps": [1, 8]},
        "parts": parts,
    }
    return Manifest(**{**facts, **changes})


@pytest.fixture
def folder(tmp_path):
    made = fill(tmp_path / "bundle")
    write_manifest(made, manifest_of(made))
    return made


def refused(call, *args, **kwargs):
    with pytest.raises(BundleError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(folder, change):
    """Applies `change` to the JSON of the manifest."""
    values = json.loads((folder / "vega-edge.json").read_text())
    change(values)
    (folder / "vega-edge.json").write_text(json.dumps(values))


# what works


def test_what_is_written_is_what_is_opened(folder):
    opened = Bundle.open(folder)
    assert opened.manifest == manifest_of(folder)
    assert opened.path == folder
    assert opened.parts == ("scheduler", "tokenizer", "unet")
    assert opened.model_index["_class_name"] == "StableDiffusionXLPipeline"
    assert opened.config("unet") == {"in_channels": 4}
    assert opened.scheduler_config == {"beta_start": 0.00085}
    assert opened.graph("unet") == folder / "unet" / "model.onnx"
    assert opened.file("tokenizer/vocab.json") == folder / "tokenizer" / "vocab.json"
    assert opened.has("unet/model.onnx_data")
    assert not opened.has("vae_decoder/pixels.onnx")


def test_the_manifest_on_disk(folder):
    values = json.loads((folder / "vega-edge.json").read_text())
    data = FILES["unet/model.onnx"].encode()
    assert list(values) == ["format", "name", "created_by", "dtype", "weights", "source", "defaults", "limits", "parts"]
    assert values["format"] == 1
    assert values["source"] == {
        "model": "demo-vega",
        "loras": [{"file": "lora.safetensors", "sha256": "ab" * 32, "strength": 0.8}],
        "vae": "tiny",
    }
    unet = values["parts"]["unet"]
    assert unet["files"]["unet/model.onnx"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert unet["parameters"] == {"conv_in.weight": {"initializer": "val_7", "transposed": True}}
    assert unet["max_relative_error"] == 1.5e-6
    assert list(values["parts"]["scheduler"]) == ["files"]


def test_a_path_may_be_text(folder):
    assert Bundle.open(str(folder)).path == folder


def test_files_of_a_part(folder):
    assert list(describe_files(folder, "unet")) == ["unet/config.json", "unet/model.onnx", "unet/model.onnx_data"]
    assert list(describe_files(folder, "config")) == ["model_index.json"]
    assert describe_files(folder, "vae_encoder") == {}


def test_a_big_file_is_hashed_whole(tmp_path):
    content = bytes(range(256)) * 8192 + b"end"  # longer than one chunk, and no multiple of it
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w").write_bytes(content)
    want = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    assert describe_files(tmp_path, "unet") == {"unet/w": want}


def test_a_foreign_folder(tmp_path):
    index = '{"_class_name": "X", "unet": ["a", "b"], "vae_encoder": ["a", "b"], "safety_checker": [null, null]}'
    opened = Bundle.open(fill(tmp_path, {**FILES, "model_index.json": index}))
    assert opened.manifest is None
    assert opened.parts == ("unet",)
    assert opened.graph("unet") == tmp_path / "unet" / "model.onnx"
    assert opened.has("tokenizer/vocab.json")
    assert not opened.has("unet")
    message = refused(opened.graph, "vae_decoder", "pixels.onnx")
    assert message == f"bundle {tmp_path} has no vae_decoder/pixels.onnx; it has the parts: unet"


def test_other_files_may_lie_beside_a_bundle_but_are_not_its_own(folder):
    (folder / "unet" / "other.onnx").write_text("never checked")
    opened = Bundle.open(folder)
    message = refused(opened.graph, "unet", "other.onnx")
    assert message == f"bundle {folder} has no unet/other.onnx; it has the parts: scheduler, tokenizer, unet"


# what is not there, or not a bundle


def test_no_such_folder(tmp_path):
    assert refused(Bundle.open, tmp_path / "none") == f"there is no bundle at {tmp_path / 'none'}; {MAKE}"
    assert refused(Bundle.open, "x" * 5000) == f"there is no bundle at {'x' * 5000}; {MAKE}"


def test_a_file_instead_of_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    want = f"{path} is a file; a bundle is a folder, made by: vega-edge export MODEL -o BUNDLE"
    assert refused(Bundle.open, path) == want


def test_a_folder_that_is_no_bundle(tmp_path):
    want = f"{tmp_path} is not a bundle: it has no model_index.json; make one: vega-edge export MODEL -o BUNDLE"
    assert refused(Bundle.open, tmp_path) == want


def test_a_checkpoint_that_was_not_exported(tmp_path):
    fill(tmp_path, {"model_index.json": "{}", "unet/diffusion_pytorch_model.safetensors": ""})
    want = f"{tmp_path} has no ONNX graphs; export it first: vega-edge export {tmp_path} -o BUNDLE"
    assert refused(Bundle.open, tmp_path) == want


# damage


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("file", "content", "part", "fault"),
    [
        ("unet/model.onnx", None, "unet", "unet/model.onnx is missing"),
        ("model_index.json", None, "config", "model_index.json is missing"),
        ("unet/model.onnx_data", b"the", "unet", "unet/model.onnx_data is truncated (3 of 11 bytes)"),
        ("unet/model.onnx_data", b"", "unet", "unet/model.onnx_data is truncated (0 of 11 bytes)"),
        ("tokenizer/vocab.json", b"{ }", "tokenizer", "tokenizer/vocab.json is altered (3 bytes, the manifest says 2)"),
    ],
)
def test_damage_that_sizes_show(folder, verify, file, content, part, fault):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    want = f"bundle {folder}, part {part}: {fault}; copy or export the bundle again"
    assert refused(Bundle.open, folder, verify) == want


def test_a_folder_in_place_of_a_file(folder):
    (folder / "unet" / "model.onnx").unlink()
    (folder / "unet" / "model.onnx").mkdir()
    want = f"bundle {folder}, part unet: unet/model.onnx is missing; copy or export the bundle again"
    assert refused(Bundle.open, folder) == want


def test_damage_that_only_the_hash_shows(folder):
    (folder / "unet" / "model.onnx_data").write_text("THE weights")
    got, want = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in ("THE weights", "the weights"))
    fault = f"unet/model.onnx_data is altered (sha256 {got}, the manifest says {want})"
    message = refused(Bundle.open, folder)
    assert message == f"bundle {folder}, part unet: {fault}; copy or export the bundle again"
    assert Bundle.open(folder, verify=False).has("unet/model.onnx_data")


def test_sizes_are_looked_at_before_anything_is_hashed(folder, monkeypatch):
    (folder / "unet" / "model.onnx").write_text("")
    monkeypatch.setattr(bundles, "_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert "truncated" in refused(Bundle.open, folder)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"[]", "must hold an object, not []"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_config_that_is_not_json(tmp_path, content, fault):
    opened = Bundle.open(fill(tmp_path))
    (tmp_path / "unet" / "config.json").write_bytes(content)
    assert refused(opened.config, "unet") == f"{tmp_path / 'unet' / 'config.json'}: {fault}; {AGAIN}"


def test_a_file_that_cannot_be_read(folder, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bundles, "known_sha256", fail)
    assert refused(Bundle.open, folder) == f"{folder / 'model_index.json'} can't be read: Permission denied"


# manifests that are wrong


def test_a_newer_manifest(folder):
    edit(folder, lambda values: values.update(format=2, parts="who knows"))
    path = folder / "vega-edge.json"
    assert refused(Bundle.open, folder) == (
        f"{path}: made by a newer vega-edge (format 2, this one reads up to 1): upgrade"
    )


KEYS = "name, created_by, dtype, weights, source, defaults, limits, parts"
NEEDED = "name, created_by, dtype, weights, source, defaults, limits"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda v: v.update(extra=1), f"unknown key 'extra'; known keys: {KEYS}"),
        (lambda v: v.pop("name"), f"key 'name' is missing; needed keys: {NEEDED}"),
        (lambda v: v.pop("format"), f"not a manifest of vega-edge: it has no 'format'; {AGAIN}"),
        (lambda v: v.update(format="1"), 'format must be a whole number from 1, not "1"'),
        (lambda v: v.update(format=True), "format must be a whole number from 1, not true"),
        (lambda v: v.update(format=0), "format must be a whole number from 1, not 0"),
        (lambda v: v.update(name=7), "name: must be a text, not 7"),
        (lambda v: v.update(dtype="fp8"), 'dtype: must be one of "fp32", "fp16", "bf16", "int8", not "fp8"'),
        (lambda v: v.update(parts=[]), "parts: must be an object, not []"),
        (lambda v: v["source"].update(vae="big"), 'source.vae: must be one of "full", "tiny", not "big"'),
        (lambda v: v["source"].update(loras={}), "source.loras: must be a list, not {}"),
        (lambda v: v["source"]["loras"][0].update(strength="1"), 'source.loras[0].strength: must be a number, not "1"'),
        (
            lambda v: v["parts"]["unet"].update(hash="x"),
            "parts.unet: unknown key 'hash'; known keys: files, max_relative_error, parameters, dtype, weights, activation_scale",
        ),
        (
            lambda v: v["parts"]["unet"]["files"]["unet/model.onnx"].pop("bytes"),
            "parts.unet.files['unet/model.onnx']: key 'bytes' is missing; needed keys: sha256, bytes",
        ),
        (
            lambda v: v["parts"]["unet"]["files"]["unet/model.onnx"].update(bytes=1.0),
            "parts.unet.files['unet/model.onnx'].bytes: must be a whole number, not 1.0",
        ),
        (
            lambda v: v["parts"]["unet"]["files"]["unet/model.onnx"].update(bytes=True),
            "parts.unet.files['unet/model.onnx'].bytes: must be a whole number, not true",
        ),
        (
            lambda v: v["parts"]["unet"].update(max_relative_error=None),
            "parts.unet.max_relative_error: must be a number, not null",
        ),
        (
            lambda v: v["parts"]["unet"]["files"]["unet/model.onnx"].update(sha256="AB" * 32),
            "parts.unet: the sha256 of 'unet/model.onnx' must be 64 lower-case hex digits",
        ),
        (
            lambda v: v["parts"]["unet"]["parameters"]["conv_in.weight"].update(transposed=1),
            "parts.unet.parameters['conv_in.weight'].transposed: must be true or false, not 1",
        ),
        (
            lambda v: v["parts"]["unet"]["files"].update({"tokenizer/x": {"sha256": "0" * 64, "bytes": 1}}),
            "parts.unet: 'tokenizer/x' belongs to part 'tokenizer'",
        ),
        (lambda v: v.update(limits={"steps": 5}), "limits: steps: must be a list, not 5"),
        (lambda v: v.update(limits={"steps": [5]}), "limits: steps must be [least, most], not [5]"),
        (lambda v: v.update(limits={"steps": [8, 1]}), "limits: steps must be [least, most], not [8, 1]"),
        (
            lambda v: v.update(defaults={"step": 4}),
            "defaults: unknown key 'step'; known keys: scheduler, family, schedule, steps, guidance, width, height, prompt_syntax",
        ),
        (lambda v: v["parts"].pop("config"), "parts.config: model_index.json is not listed"),
    ],
)
def test_a_wrong_manifest(folder, change, fault):
    edit(folder, change)
    assert refused(Bundle.open, folder) == f"{folder / 'vega-edge.json'}: {fault}"


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "unet/../../x",
        "/etc/passwd",
        "C:/x",
        "unet\\..\\x",
        "unet//x",
        "./x",
        "unet/",
        "",
        "a\0",
        "vega-edge.json",
    ],
)
def test_a_manifest_names_only_files_inside(folder, name):
    edit(folder, lambda v: v["parts"]["config"]["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    fault = f"parts.config: {name!r} is not the name of a file inside the bundle"
    assert refused(Bundle.open, folder) == f"{folder / 'vega-edge.json'}: {fault}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "not a manifest of vega-edge: it has no 'format'"),
        ('{"format": 1, "format": 1}', "key 'format' is given twice"),
        ('{"format": NaN}', "NaN is not allowed as a number"),
    ],
)
def test_a_manifest_that_is_not_one(folder, text, fault):
    (folder / "vega-edge.json").write_text(text)
    assert refused(Bundle.open, folder) == f"{folder / 'vega-edge.json'}: {fault}; {AGAIN}"


def test_json_without_end(folder):
    (folder / "vega-edge.json").write_text('{"a":' * 100_000)
    assert refused(Bundle.open, folder).startswith(f"{folder / 'vega-edge.json'}: not JSON: ")


def test_optional_keys_may_be_left_out(folder):
    def shorten(values):
        values["source"] = {"model": "m"}
        for key in ("max_relative_error", "parameters"):
            del values["parts"]["unet"][key]

    edit(folder, shorten)
    manifest = Bundle.open(folder).manifest
    assert manifest is not None
    assert manifest.source == Source("m", (), "full")
    assert manifest.parts["unet"].max_relative_error is None


def test_a_whole_number_is_a_number():
    assert records.decode(Lora, {"file": "f", "sha256": "0", "strength": 1}) == Lora("f", "0", 1.0)


# writing


def test_a_manifest_that_misses_a_file_is_not_written(tmp_path):
    manifest = manifest_of(fill(tmp_path))
    fill(tmp_path, {"unet/extra.bin": "", "vae_decoder/model.onnx": ""})
    want = f"{tmp_path}: the manifest does not list unet/extra.bin, vae_decoder/model.onnx"
    assert refused(write_manifest, tmp_path, manifest) == want
    assert not (tmp_path / "vega-edge.json").exists()


def test_a_manifest_of_files_that_are_not_there_is_not_written(tmp_path):
    manifest = manifest_of(fill(tmp_path))
    (tmp_path / "unet" / "model.onnx").unlink()
    want = f"bundle {tmp_path}, part unet: unet/model.onnx is missing; copy or export the bundle again"
    assert refused(write_manifest, tmp_path, manifest) == want


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path):
    manifest = manifest_of(fill(tmp_path), dtype="fp8")
    want = f'{tmp_path / "vega-edge.json"}: dtype: must be one of "fp32", "fp16", "bf16", "int8", not "fp8"'
    assert refused(write_manifest, tmp_path, manifest) == want
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model_index.json"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_manifest(folder, monkeypatch, failure):
    def fail(*args):
        raise failure

    before = (folder / "vega-edge.json").read_text()
    monkeypatch.setattr(bundles.os, "replace", fail)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            write_manifest(folder, manifest_of(folder, name="new"))
    else:
        want = f"{folder / 'vega-edge.json'} can't be written: No space left on device"
        assert refused(write_manifest, folder, manifest_of(folder, name="new")) == want
    assert (folder / "vega-edge.json").read_text() == before
    assert [path.name for path in folder.iterdir() if "vega-edge" in path.name] == ["vega-edge.json"]


def test_a_manifest_can_be_written_again(folder):
    write_manifest(folder, manifest_of(folder, name="new"))
    opened = Bundle.open(folder).manifest
    assert opened is not None
    assert opened.name == "new"


def test_importing_bundle_is_light():
    code = (
        "import sys, vega_edge.bundle; "
        "print([m for m in ('numpy', 'onnxruntime', 'openvino', 'torch') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
