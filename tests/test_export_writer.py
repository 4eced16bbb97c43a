"""A bundle appears whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from vega_edge.errors import BundleError, ExportError
from vega_edge.export import export_bundle
from vega_edge.manifest import MANIFEST


def unwritten_manifest() -> BundleError:
    failure = BundleError("vega-edge.json can't be written: No space left on device")
    failure.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return failure


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ExportError,
            "disk full while exporting to {out}; free some space: nothing was left behind",
        ),
        (
            unwritten_manifest(),
            ExportError,
            "disk full while exporting to {out}; free some space: nothing was left behind",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            ExportError,
            "{out} can't be written: Input/output error; nothing was left behind",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (ExportError("unet: differs"), ExportError, "unet: differs"),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[BaseException],
    message: str,
    overwrite: bool,
) -> None:
    """And what was there before stays as it was."""
    out = tmp_path / "bundle"
    if overwrite:
        out.mkdir()
        (out / MANIFEST).write_text("old")

    def run(exporter: Any) -> None:
        (exporter.folder / "unet").mkdir()
        (exporter.folder / "unet" / "model.onnx").write_bytes(b"half a graph")
        raise failure

    monkeypatch.setattr("vega_edge.export.parts.PartsExporter.run", run)
    with pytest.raises(raised) as caught:
        export_bundle(checkpoint, out, overwrite=overwrite)
    assert str(caught.value) == message.format(out=out)
    assert [p.name for p in tmp_path.rglob("*")] == (["bundle", MANIFEST] if overwrite else [])


@pytest.mark.parametrize(
    ("free", "said"), [(0, "disk full while exporting to"), (1 << 30, "can't be written: 3 requested")]
)
def test_a_write_that_fails_without_a_number(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str
) -> None:
    """numpy's tofile, which writes the weights, says no errno: what is free tells."""

    def run(exporter: Any) -> None:
        raise OSError("3 requested and 0 written")

    monkeypatch.setattr("vega_edge.export.parts.PartsExporter.run", run)
    monkeypatch.setattr("vega_edge.export.writer.check_room", lambda *_: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ExportError, match=said):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A real process, stopped while it writes parts."""
    command = [sys.executable, "-u", "-m", "vega_edge", "export", str(checkpoint), "-o", str(tmp_path / "bundle")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3000):  # until the first part is under way in the folder beside the bundle
            if any(tmp_path.rglob("vocab.json")) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    # CPython ends by the signal itself if a library's exec() of a text was interrupted; a shell says 130 of both
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert stderr.splitlines()[-1] == "vega-edge: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_of_two_exports_one_gets_the_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(exporter: Any) -> dict[str, Any]:
        for part in ("text_encoder", "vae_encoder", "vae_decoder", "unet"):
            (exporter.folder / part).mkdir()
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "other").touch()
        return {}

    monkeypatch.setattr("vega_edge.export.parts.PartsExporter.run", run)
    with pytest.raises(ExportError, match="was made by another process meanwhile; choose another folder"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle", "other"]


def test_overwrite_replaces(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text("old")

    def run(exporter: Any) -> dict[str, Any]:
        for part in ("text_encoder", "vae_encoder", "vae_decoder", "unet"):
            (exporter.folder / part).mkdir()
        return {}

    monkeypatch.setattr("vega_edge.export.parts.PartsExporter.run", run)
    export_bundle(checkpoint, tmp_path / "bundle", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST).read_text() != "old"
    assert (tmp_path / "bundle" / "unet" / "config.json").exists()


def test_only_bundles_are_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    """Not the folder of one's holiday pictures, nor the checkpoint itself."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", checkpoint):
        with pytest.raises(ExportError) as caught:
            export_bundle(checkpoint, out, overwrite=True)
        assert str(caught.value) == (
            f"{out} exists and is no bundle of ours, so it is not overwritten; choose another folder"
        )
    assert (tmp_path / "file").read_text() == "mine" and (checkpoint / "unet" / "config.json").exists()


def test_a_folder_that_can_not_be_made(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "bundle")
    assert str(caught.value) == (
        f"{tmp_path / 'bundle'} can't be made (Permission denied); choose a folder that you may write to"
    )
