"""`vega-edge verify`: a whole bundle, and one that is damaged, mis-shaped or gives no numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from vega_edge import engines
from vega_edge.bundle import Bundle
from vega_edge.cli import main
from vega_edge.errors import BundleError, EngineError
from vega_edge.manifest import MANIFEST
from vega_edge.models import find_bundle
from vega_edge.verify import Check, Verdict, raise_for, render, verify


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))


def test_the_embedded_model_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "demo-vegart", "--engine", "onnxruntime-cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["name"] == "demo-vegart" and told["engine"] == "onnxruntime-cpu"
    manifest = Bundle.open(find_bundle("demo-vegart")).manifest
    assert manifest and told["files"] == sum(len(part.files) for part in manifest.parts.values())
    by_graph = {check["graph"]: check for check in told["checks"]}
    assert {"text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/pixels.onnx"} <= by_graph.keys()
    assert all(check["fault"] == "" and check["bytes"] > 1000 for check in told["checks"])


def test_an_altered_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy / "unet" / "model.onnx_data"
    raw = bytearray(weights.read_bytes())
    raw[1000] ^= 1
    weights.write_bytes(raw)
    assert main(["verify", str(copy)]) == 1
    assert f"bundle {copy}, part unet: unet/model.onnx_data is altered (sha256" in capsys.readouterr().err
    with pytest.raises(BundleError):
        verify(copy)


def test_a_configuration_that_promises_other_shapes(copy: Path) -> None:
    """Without a manifest there are no hashes to tell; the shapes do."""
    (copy / MANIFEST).unlink()
    config = copy / "text_encoder" / "config.json"
    told = json.loads(config.read_text())
    width = told["hidden_size"]
    config.write_text(json.dumps(told | {"hidden_size": width + 1}))
    unet = copy / "unet" / "config.json"
    told = json.loads(unet.read_text())
    unet.write_text(json.dumps(told | {"cross_attention_dim": told["cross_attention_dim"] + 8}))
    verdict = verify(copy, "onnxruntime-cpu")
    faults = {check.graph: check.fault for check in verdict.checks}
    assert faults["text_encoder/model.onnx"] == (
        f"last_hidden_state has shape [1, 77, {width}], its configuration promises [1, 77, {width + 1}]"
    )
    assert "encoder_hidden_states" in faults["unet/model.onnx"] and not faults["vae_decoder/model.onnx"]
    assert not verdict.ok and verdict.files == 0


def test_what_is_told() -> None:
    checks = (Check("unet/model.onnx", "fp16", "int8", 7_400_000, 0.25, ""), Check("b/x.onnx", "", "", 10, 1.0, "bad"))
    verdict = Verdict("here", "mine", "onnxruntime-cpu", 0, checks)
    assert render(verdict).splitlines() == [
        "graph            dtype, weights    size   time",
        "unet/model.onnx  fp16, int8      7.4 MB  0.2 s  ok",
        "b/x.onnx         not said        0.0 MB  1.0 s  bad",
        "mine on onnxruntime-cpu: no manifest: nothing to compare with; 1 of 2 graphs are faulty",
    ]
    with pytest.raises(EngineError) as caught:
        raise_for(verdict)
    assert str(caught.value) == "bundle here, b/x.onnx: bad; export the bundle again"


def test_engines_of_tensorrt_are_run_at_the_shapes_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the graphs that a build takes, and two pictures of 64x96 px, which a made-up GPU draws."""
    built = {
        "unet": {"sample": (2, 4, 8, 12)}, "vae_decoder": {"latent_sample": (2, 4, 8, 12)},
        "vae_encoder": {"sample": (2, 3, 64, 96)}, "tiny_vae_decoder": {"latent_sample": (2, 4, 8, 12)},
        "text_encoder": {"input_ids": (2, 77)}, "text_encoder_2": {"input_ids": (2, 77)},
    }  # fmt: skip
    seen: dict[str, dict[str, tuple[int, ...]]] = {}
    plain = engines.open_engine

    class Recorder:
        def __init__(self, path: Path) -> None:
            self._engine, self._graph = plain(path, "onnxruntime-cpu"), f"{path.parent.name}/{path.name}"
            self.inputs = self._engine.inputs

        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            seen[self._graph] = {name: array.shape for name, array in feeds.items()}
            return self._engine.run(feeds)

        def close(self) -> None:
            self._engine.close()

    monkeypatch.setattr("vega_edge.verify.open_engine", lambda path, *a, **k: Recorder(path))
    monkeypatch.setattr("vega_edge.verify.built_shapes", lambda path, *a: built[path.parent.name])
    verdict = verify(find_bundle("demo-vegart"), "tensorrt-rtx")
    assert [check.fault for check in verdict.checks] == [""] * 6
    assert set(seen) == {f"{part}/{'pixels' if 'decoder' in part else 'model'}.onnx" for part in built}
    for graph, shapes in seen.items():
        assert built[graph.split("/")[0]].items() <= shapes.items()
        assert {shape[0] for name, shape in shapes.items() if name != "timestep"} == {2}
