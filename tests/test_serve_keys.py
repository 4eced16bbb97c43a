"""The file of keys while a server uses it: revoked, unreadable, garbled, and written by somebody else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import VegaEdgeError
from vega_edge.serve import keys

from .serve_running import running

CURE = "make it: vega-edge serve keys add NAME --api-keys"


@pytest.fixture(autouse=True)
def looked_at_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)


def unreadable(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """As for a server that does not own it: tests may run as root, who may read everything."""
    read_text = Path.read_text

    def refused(self: Path, **options: str) -> str:
        if self == file:
            raise PermissionError(13, "Permission denied")
        return read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", refused)


def test_a_key_that_is_revoked_in_a_file_that_can_not_be_read_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    old, kept = keys.add(file, "old"), keys.add(file, "kept")
    known = keys.KeyFile(file)
    keys.revoke(file, "old")
    with pytest.MonkeyPatch.context() as patch:
        unreadable(patch, file)
        assert [known.owner(key) for key in (old, kept, old)] == [None] * 3
        assert known.failure == f"{file} can't be read: Permission denied; no key is known now"
        assert caplog.text.count("Permission denied") == 1
    assert (known.owner(old), known.owner(kept)) == (None, "kept")  # the file is what it was: it was only not readable
    assert known.failure is None


def test_readyz_says_that_keys_are_not_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add(file, "me")
    good = file.read_text()
    with running(tmp_path / "data", api_keys=file) as server:
        file.write_text("half written")
        assert server.post("/v1/demo-vegart", headers={"x-api-key": key}).status_code == 200
        answer = server.http.get("/readyz")
        assert answer.status_code == 503 and "the keys that were in it stay" in answer.json()["why"][0]
        file.unlink()
        assert server.post("/v1/demo-vegart", headers={"x-api-key": key}).status_code == 401
        assert "no key is known now" in server.http.get("/readyz").json()["why"][0]
        file.write_text(good)
        assert server.http.get("/readyz").json() == {"ready": True, "why": []}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_who_changes_the_keys_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys.add(file, "me")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    if os.getuid() == 0:
        os.chown(file, 12345, 23456)
    before = file.stat()
    keys.add(file, "other")
    keys.revoke(file, "me")
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_file_that_can_not_be_read_at_the_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VegaEdgeError) as failure:
        keys.KeyFile(tmp_path)
    why = "Permission denied" if sys.platform == "win32" else "Is a directory"
    assert str(failure.value) == f"{tmp_path} can't be read: {why}"


def test_changes_at_the_same_time_are_all_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was handed out and is not in the file opens nothing; one that was revoked and is, everything."""
    file = tmp_path / "keys.json"
    keys.add(file, "old")
    load = keys.load

    def slow(path: Path) -> list[keys.Key]:
        found = load(path)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(keys, "load", slow)
    names = [f"k{i}" for i in range(8)]
    with ThreadPoolExecutor(9) as pool:
        made = [*(pool.submit(keys.add, file, name) for name in names), pool.submit(keys.revoke, file, "old")]
        for each in made:
            each.result()
    assert sorted(key.name for key in load(file)) == names


@pytest.mark.parametrize("change", [keys.add, keys.revoke])
def test_keys_in_a_folder_that_is_not_there(tmp_path: Path, change: Callable[[Path, str], object]) -> None:
    file = tmp_path / "nowhere" / "keys.json"
    with pytest.raises(VegaEdgeError, match=r"keys\.json (can't be written: No such file|does not exist; make it: )"):
        change(file, "me")
    assert not file.parent.exists()
