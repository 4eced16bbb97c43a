"""Picture files: whole or not at all, never over another, with their parameters inside."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image

from vega_edge.errors import UsageError, VegaEdgeError
from vega_edge.runtime import pictures

PICTURE = Image.new("RGB", (64, 64), "red")
TEXT = "a star ★\nSteps: 4"


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp"])
def test_parameters_come_back(tmp_path: Path, name: str) -> None:
    pictures.save(PICTURE, tmp_path / name, TEXT)
    with Image.open(tmp_path / name) as read:
        assert read.size == (64, 64)
        if name == "p.png":
            assert read.text["parameters"] == TEXT
        else:
            assert read.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + TEXT.encode("utf-16-be")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp"])
def test_a_prompt_of_ten_thousand_words(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    pictures.save(PICTURE, tmp_path / name, "word " * 10_000)
    assert Image.open(tmp_path / name).size == (64, 64)
    assert [m.split("; ")[1] for m in caplog.messages] == (
        [] if name == "p.png" else ["its end is left out of the file's comment"]
    )


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_a_file_has_the_mode_that_others_have(tmp_path: Path) -> None:
    pictures.save(PICTURE, tmp_path / "p.png", TEXT)
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("p.png", "other")]
    assert modes[0] == modes[1]


def test_of_two_writers_one_gets_the_name(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    pictures.check_target(path, overwrite=False)
    path.write_bytes(b"another's")
    with pytest.raises(UsageError) as error:
        pictures.save(PICTURE, path, TEXT)
    assert str(error.value) == f"{path} exists already; choose another name, or pass --overwrite"
    assert path.read_bytes() == b"another's"
    pictures.save(PICTURE, path, TEXT, overwrite=True)
    assert Image.open(path).size == (64, 64)
    assert pictures.free_name(path) == tmp_path / "p-2.png"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps links for administrators")
def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "p.png", tmp_path / "link.png"
    pictures.save(PICTURE, target, "before")
    link.symlink_to(target)
    pictures.check_target(link, overwrite=True)
    pictures.save(PICTURE, link, TEXT, overwrite=True)
    assert link.is_symlink() and not target.is_symlink()
    with Image.open(target) as read:
        assert read.text["parameters"] == TEXT


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    path = tmp_path / "p.png"
    if overwrite:
        path.write_bytes(b"")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(VegaEdgeError) as error:
        pictures.save(PICTURE, path, TEXT, overwrite)
    assert str(error.value) == f"{path} could not be written: {os.strerror(errno.ENOSPC)}"
    assert [p.name for p in tmp_path.iterdir()] == (["p.png"] if overwrite else [])


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "nul\0.png"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png can't be used: "):
        pictures.check_target(tmp_path / name, overwrite=False)
