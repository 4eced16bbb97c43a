"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from vega_edge.whole_file import sha256_of, writing


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def test_replaces_what_was_there_when_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"before")
    with writing(file) as stream:
        stream.write(b"af")
        stream.flush()
        assert file.read_bytes() == b"before"
        stream.write(b"ter")
    assert file.read_bytes() == b"after" and names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps links for administrators")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_leads_to_what_was_written(tmp_path: Path, there: bool) -> None:
    for name in ("far", "near"):
        (tmp_path / name).mkdir()
    target, link, chain = tmp_path / "far" / "a", tmp_path / "near" / "b", tmp_path / "near" / "c"
    if there:
        target.write_bytes(b"before")
    link.symlink_to("../far/a")
    chain.symlink_to("b")
    for path, text in ((link, b"one"), (chain, b"two")):
        with writing(path) as stream:
            stream.write(text)
        assert target.read_bytes() == text and not target.is_symlink()
    assert link.is_symlink() and chain.is_symlink() and sorted(names(tmp_path / "near")) == ["b", "c"]
    with pytest.raises(FileExistsError), writing(link, replace=False) as stream:
        stream.write(b"three")
    assert link.is_symlink() and target.read_bytes() == b"two" and names(tmp_path / "far") == ["a"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_the_block_does_not_end(tmp_path: Path, failure: BaseException) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"before")
    with pytest.raises(type(failure)), writing(file) as stream:
        stream.write(b"half")
        raise failure
    assert file.read_bytes() == b"before" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_another_has_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", none)
    with writing(tmp_path / "a", replace=False) as stream:
        stream.write(b"ours")
        assert names(tmp_path) != ["a"]
    with pytest.raises(FileExistsError), writing(tmp_path / "a", replace=False) as stream:
        stream.write(b"theirs")
    assert (tmp_path / "a").read_bytes() == b"ours" and names(tmp_path) == ["a"]


def test_a_disk_that_is_full_only_when_the_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), writing(tmp_path / "a") as stream:
        stream.write(b"whole")
    assert names(tmp_path) == []


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    with writing(tmp_path / ("n" * 255)) as stream:
        stream.write(b"x")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"x"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for permissions, expected in ((0o666, 0o644), (0o600, 0o600)):
            with writing(tmp_path / "a", permissions) as stream:
                stream.write(b"x")
            assert (tmp_path / "a").stat().st_mode & 0o777 == expected
    finally:
        os.umask(before)


def test_a_files_hash_is_read_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "small") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(1 << 25)
    tracemalloc.start()
    try:
        sha256_of(tmp_path / "large")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "gone")
