"""An export that is killed: nothing of it is taken for a bundle, and the next one goes on with the parts that are whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from vega_edge.bundle import Bundle
from vega_edge.errors import BundleError, ExportError
from vega_edge.export import Progress, export_bundle, model_source, needs, writer
from vega_edge.export.checkpoint import open_checkpoint
from vega_edge.export.precision import Precision

KILLED = """
import os, sys
from pathlib import Path
from vega_edge.export import export_bundle
def progress(at):
    if (at.part, at.phase) == ("unet", "write"):
        os._exit(9)  # no handler, no finally: as kill -9
export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), weights="fp16", progress=progress)
"""


@pytest.fixture
def killed(checkpoint: Path, tmp_path: Path) -> Path:
    """Where the bundle would have been."""
    out = tmp_path / "bundle"
    assert subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(out)], check=False).returncode == 9
    return out


def test_a_killed_export_is_resumed(checkpoint: Path, killed: Path) -> None:
    folder = killed.with_name(".bundle.part")
    with pytest.raises(BundleError, match="there is no bundle at"):
        Bundle.open(killed)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*/model.onnx_data")}
    assert (folder / "text_encoder" / "model.onnx").is_file()
    (folder / "vae_decoder" / "pixels.onnx").write_bytes(b"altered")  # then it is not as it was, and is made again
    seen: list[Progress] = []
    report = export_bundle(checkpoint, killed, weights="fp16", progress=seen.append)
    assert {at.part for at in seen} == {"vae_decoder", "unet"} and seen[-1].index == seen[-1].total == 8
    assert [note for note in report.notes if "interrupted" in note] == [
        "text_encoder is from an export of the same that was interrupted",
        "vae_encoder is from an export of the same that was interrupted",
    ]
    assert [part.name for part in report.parts] == ["text_encoder", "vae_encoder", "vae_decoder", "unet"]
    assert Bundle.open(killed).parts == ("scheduler", "text_encoder", "tokenizer", "unet", "vae_decoder", "vae_encoder")
    assert [p.name for p in killed.parent.iterdir()] == ["bundle"] and before


def test_another_export_takes_nothing_of_it(checkpoint: Path, killed: Path) -> None:
    seen: list[Progress] = []
    report = export_bundle(checkpoint, killed, weights="fp32", progress=seen.append)
    assert {at.part for at in seen} == {"text_encoder", "vae_encoder", "vae_decoder", "unet"}
    assert not [note for note in report.notes if "interrupted" in note]
    assert [p.name for p in killed.parent.iterdir()] == ["bundle"]


def test_the_key_knows_what_changes_a_graph(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, option, LoRA, file or version: nothing of the unfinished export fits. Its name and limits: all does."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())

    def key(source: Path = checkpoint, **options: Any) -> str:
        tiny, seed = options.pop("tiny_vae", None), options.pop("random_weights", None)
        own = model_source(source, random_weights=seed)
        given = {
            "loras": (),
            "precision": Precision("fp32", "fp32"),
            "vae": "full",
            "name": "x",
            **options,
        }
        return writer._key(own.open(tiny), writer._Request(own, tmp_path / "out", **given))

    touched = Path(shutil.copytree(checkpoint, tmp_path / "touched"))
    os.utime(touched / "unet" / "diffusion_pytorch_model.safetensors", (0, 0))
    scheduled = Path(shutil.copytree(checkpoint, tmp_path / "scheduled"))
    schedule = scheduled / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    keys = [
        key(), key(random_weights=3), key(random_weights=4), key(precision=Precision("fp32", "fp16")),
        key(precision=Precision("fp16", "fp16")), key(loras=((files[0], 1.0),)), key(loras=((files[0], 0.5),)),
        key(loras=((files[1], 1.0),)), key(loras=((files[0], 1.0), (files[1], 1.0))),
        key(loras=((files[1], 1.0), (files[0], 1.0))), key(tiny_vae=checkpoint / "tiny"),
        key(tiny_vae=checkpoint / "tiny", vae="tiny"), key(touched), key(scheduled, random_weights=3),
    ]  # fmt: skip
    assert len({*keys}) == len(keys)
    assert key(random_weights=3) == keys[1] and key(name="another") == keys[0]
    monkeypatch.setattr(writer, "__version__", "0.0.1")
    assert key() not in keys


def test_two_exports_of_one_target(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    refused: list[str] = []

    def progress(at: Progress) -> None:
        if not refused:
            with pytest.raises(ExportError) as caught:
                export_bundle(checkpoint, out)
            refused.append(str(caught.value))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, out, progress=progress)
    assert refused == [f"{out} is being made by another export at this moment; wait for it, or choose another folder"]
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    parts = needs.bundle_parts(open_checkpoint(checkpoint), "full")
    sizes = needs.part_bytes(open_checkpoint(checkpoint), Precision("fp32", "fp32"), parts)
    assert set(sizes) == set(parts) and sizes["vae_encoder"] < sizes["vae_decoder"] < sizes["unet"]
    monkeypatch.setattr(needs, "part_bytes", lambda *_: {"text_encoder": 10**9, "unet": 5 * 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=6 * 10**9))
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "bundle")
    assert str(caught.value) == (
        f"exporting to {tmp_path / 'bundle'} takes 6.1 GB of disk, 6.0 GB are free there; free some, choose another "
        "disk, or store less: --weights fp16 or int8"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=7 * 10**9))
    monkeypatch.setattr(needs, "_available_memory", lambda: 7 * 10**9)
    less = ", or store less: --weights fp16"
    for weights, takes, cure in (
        ("fp32", "7.4", less),
        ("fp16", "7.4", ""),
        ("int8", "13.9", ""),
    ):  # eight bits are sixteen when they are loaded
        with pytest.raises(ExportError) as caught:
            export_bundle(checkpoint, tmp_path / "bundle", weights=weights)
        assert str(caught.value) == (
            f"exporting unet takes {takes} GB of memory, 7.0 GB are available; close other programs{cure}"
        )
    assert list(tmp_path.iterdir()) == []
