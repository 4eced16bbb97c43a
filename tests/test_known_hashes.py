"""Hashes of large files that are remembered: when they are taken for granted, and when not."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vega_edge import known_hashes
from vega_edge.bundle import Bundle, Manifest, Part, Source, describe_files, write_manifest
from vega_edge.engines.plan_store import Plan, PlanStore
from vega_edge.errors import BundleError
from vega_edge.known_hashes import LEAST_BYTES, known_sha256
from vega_edge.verify import verify

HASH_OF_ZEROS = hashlib.sha256(bytes(LEAST_BYTES)).hexdigest()


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The names of the files that were read through. Files are old: what was written just now is not remembered."""
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(known_hashes, "_SETTLED_NS", -1)
    names, really = [], known_hashes.sha256_of

    def sha256_of(path):
        names.append(path.name)
        return really(path)

    monkeypatch.setattr(known_hashes, "sha256_of", sha256_of)
    start_anew()
    yield names
    start_anew()


def start_anew() -> None:
    """As another process would."""
    known_hashes._known.clear()


def zeros(path: Path, size: int = LEAST_BYTES) -> Path:
    with open(path, "wb") as stream:
        stream.truncate(size)
    return path


def test_a_large_file_is_read_once(tmp_path, read):
    file = zeros(tmp_path / "weights")
    for _ in range(3):
        assert known_sha256(file) == HASH_OF_ZEROS
        start_anew()
    assert read == ["weights"]


def test_small_files_are_read_each_time_and_not_listed(tmp_path, read):
    file = zeros(tmp_path / "small", LEAST_BYTES - 1)
    assert known_sha256(file) == known_sha256(file)
    assert read == ["small", "small"]
    assert not known_hashes._file().exists()


def altered(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.write(b"evil")


def altered_with_the_time_put_back(file: Path) -> None:
    state = file.stat()
    altered(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced_with_the_time_put_back(file: Path) -> None:
    state = file.stat()
    other = zeros(file.with_name("other"))
    altered(other)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, file)


def longer(file: Path) -> None:
    state = file.stat()
    zeros(file, LEAST_BYTES + 1)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = [altered, longer, replaced_with_the_time_put_back]
if os.name == "posix":  # elsewhere the time of change is that of creation
    CHANGES.append(altered_with_the_time_put_back)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("process", ["same", "next"])
def test_a_file_that_changed_is_read_again(tmp_path, read, change, process):
    file = zeros(tmp_path / "weights")
    known_sha256(file)
    change(file)
    if process == "next":
        start_anew()
    assert known_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != HASH_OF_ZEROS


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, read, monkeypatch):
    """Within a tick of the clock it could change and look the same."""
    monkeypatch.setattr(known_hashes, "_SETTLED_NS", 3600 * 10**9)
    file = zeros(tmp_path / "weights")
    known_sha256(file)
    known_sha256(file)
    assert read == ["weights", "weights"]
    assert known_hashes._SETTLED_NS > 0 and not known_hashes._file().exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, read, monkeypatch):
    file, really = zeros(tmp_path / "weights"), known_hashes.sha256_of

    def sha256_of(path):
        digest = really(path)
        altered(path)
        return digest

    monkeypatch.setattr(known_hashes, "sha256_of", sha256_of)
    known_sha256(file)
    monkeypatch.setattr(known_hashes, "sha256_of", really)
    assert known_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != HASH_OF_ZEROS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"format": 2, "files": {}}', b'{"format": 1, "files": {"a": [1]}}', b"[" * 100_000],
)
def test_a_damaged_record_costs_time_and_nothing_else(tmp_path, read, content):
    file = zeros(tmp_path / "weights")
    known_hashes._file().parent.mkdir()
    known_hashes._file().write_bytes(content)
    assert known_sha256(file) == HASH_OF_ZEROS
    start_anew()
    assert known_sha256(file) == HASH_OF_ZEROS
    assert read == ["weights"]  # written anew


def test_a_record_that_cannot_be_written(tmp_path, read, caplog):
    caplog.set_level(logging.INFO, known_hashes.__name__)
    (tmp_path / "home").write_text("a file in the folder's place")
    file = zeros(tmp_path / "weights")
    assert known_sha256(file) == known_sha256(file) == HASH_OF_ZEROS
    assert read == ["weights"]  # this process knows it
    assert "known-hashes.json can't be written" in caplog.text


def test_files_that_are_gone_are_dropped_and_those_of_other_processes_kept(tmp_path, read):
    for name in ("gone", "other", "own"):
        known_sha256(zeros(tmp_path / name))
        start_anew()
        (tmp_path / "gone").unlink(missing_ok=True)
    assert sorted(json.loads(known_hashes._file().read_text())["files"]) == [
        str(tmp_path / "other"), str(tmp_path / "own"),
    ]  # fmt: skip
    if os.name == "posix":
        assert known_hashes._file().stat().st_mode & 0o077 == 0


def test_threads_lose_nothing(tmp_path, read):
    files = [zeros(tmp_path / f"{i}") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(known_sha256, files)) == {HASH_OF_ZEROS}
    assert len(json.loads(known_hashes._file().read_text())["files"]) == 8


def test_a_file_that_is_not_there(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        known_sha256(tmp_path / "gone")


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    zeros(folder / "unet" / "model.onnx")
    (folder / "model_index.json").write_text("{}")
    parts = {part: Part(describe_files(folder, part)) for part in ("unet", "config")}
    write_manifest(folder, Manifest("model", "test", "fp32", "fp32", Source("seed"), {}, {}, parts))
    return folder


def test_a_bundle_and_its_engine_are_read_once(bundle, read):
    store = PlanStore(bundle)
    plan = Plan("", "", 0, "unet/model.onnx", "", "tensorrt-rtx", "1.7", ("sm_89",), {})
    plan = store.add(plan, bytes(LEAST_BYTES), 1)
    for _ in range(2):
        Bundle.open(bundle)
        store.check(plan)
        start_anew()
    assert [name for name in read if name != "model_index.json"] == ["model.onnx", plan.file]
    altered(bundle / "unet" / "model.onnx")
    with pytest.raises(BundleError, match=r"unet/model\.onnx is altered"):
        Bundle.open(bundle)


def test_verify_reads_what_a_disk_may_have_altered(bundle, read):
    """Bits that rot change no time."""
    file = bundle / "unet" / "model.onnx"
    Bundle.open(bundle)
    altered(file)
    known_hashes._known[str(file)][:4] = known_hashes._state(file)
    Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"unet/model\.onnx is altered"):
        verify(bundle)
