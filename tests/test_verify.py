"""`vega-edge verify`: a whole bundle, and one that is damaged, mis-shaped or gives no numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vega_edge import engines
from vega_edge.bundle import Bundle
from vega_edge.cli import main
from vega_edge.engines import Engine, nvidia
from vega_edge.errors import BundleError, EngineError
from vega_edge.manifest import MANIFEST
from vega_edge.models import find_bundle
from vega_edge.verify import Check, Verdict, raise_for, render, verify


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))


@pytest.fixture
def foreign(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that has no manifest to tell of anything; its graphs are taken to run, which is not what is looked at."""
    (copy / MANIFEST).unlink()
    monkeypatch.setattr("vega_edge.verify._fault", lambda engine, smoke: "")
    return copy


def faults_of(verdict: Verdict) -> dict[str, str]:
    return {check.graph: check.fault for check in verdict.checks}


def failed(bundle: Path) -> dict[str, str]:
    return {name: fault for name, fault in faults_of(verify(bundle, "onnxruntime-cpu")).items() if fault}


def test_the_embedded_model_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "demo-vegart", "--engine", "onnxruntime-cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["name"] == "demo-vegart" and told["engine"] == "onnxruntime-cpu"
    manifest = Bundle.open(find_bundle("demo-vegart")).manifest
    assert manifest and told["files"] == sum(len(part.files) for part in manifest.parts.values())
    by_graph = {check["graph"]: check for check in told["checks"]}
    assert {"text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/pixels.onnx"} <= by_graph.keys()
    assert {"tokenizer", "tokenizer_2", "scheduler"} <= by_graph.keys()
    assert all(check["fault"] == "" and check["bytes"] > 100 for check in told["checks"])


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
    faults = faults_of(verdict)
    assert faults["text_encoder/model.onnx"] == (
        f"last_hidden_state has shape [1, 77, {width}], its configuration promises [1, 77, {width + 1}]"
    )
    assert "encoder_hidden_states" in faults["unet/model.onnx"] and not faults["vae_decoder/model.onnx"]
    assert not verdict.ok and verdict.files == 0


def test_parts_that_a_picture_needs_are_missing(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (foreign / "text_encoder" / "model.onnx").unlink()
    (foreign / "vae_decoder" / "pixels.onnx").unlink()
    assert failed(foreign) == {"text_encoder/model.onnx": "is missing"}
    (foreign / "vae_decoder" / "model.onnx").unlink()
    (foreign / "tokenizer_2" / "merges.txt").unlink()
    shutil.rmtree(foreign / "tokenizer")
    (foreign / "scheduler" / "scheduler_config.json").write_text("{}")
    faults = failed(foreign)
    assert faults.pop("tokenizer").startswith(f"bundle {foreign} has no tokenizer/vocab.json; it has the parts: ")
    assert faults.pop("tokenizer_2").startswith(f"{foreign / 'tokenizer_2'}: the tokenizer can't be read: ")
    assert faults == {
        "text_encoder/model.onnx": "is missing",
        "vae_decoder/model.onnx": "is missing",
        "scheduler": "scheduler_config.json names no scheduler: it has no _class_name",
    }
    assert main(["verify", str(foreign), "--engine", "onnxruntime-cpu"]) == 1
    told = capsys.readouterr()
    assert f"bundle {foreign}, text_encoder/model.onnx: is missing; export the bundle again\n" in told.err
    assert "5 of 10 checks failed" in told.out


def test_a_model_index_that_says_nothing(foreign: Path) -> None:
    (foreign / "model_index.json").write_text("{}")
    assert failed(foreign) == {"model_index.json": "names no text_encoder, tokenizer, unet, scheduler"}


def edit(path: Path, **values: object) -> None:
    """None takes a key away."""
    told = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def test_configurations_that_lack_or_garble_a_number(foreign: Path) -> None:
    edit(foreign / "text_encoder" / "config.json", vocab_size="many")
    edit(foreign / "text_encoder_2" / "config.json", hidden_size=None)
    edit(foreign / "unet" / "config.json", addition_time_embed_dim=0)
    edit(foreign / "vae_decoder" / "config.json", scaling_factor="none")
    edit(foreign / "tiny_vae_decoder" / "config.json", block_out_channels=3, decoder_block_out_channels=3)
    edit(foreign / "scheduler" / "scheduler_config.json", beta_start="low")
    garbled = "must be a whole number from 1 to 65536; copy or export the bundle again"
    faults = failed(foreign)
    assert faults["text_encoder/model.onnx"] == (
        f'bundle {foreign}, part text_encoder: text_encoder/config.json has "many" for vocab_size, which '
        "must be a whole number from 1 to 1048576; copy or export the bundle again"
    )
    assert faults["text_encoder_2/model.onnx"] == (
        f"bundle {foreign}, part text_encoder_2: text_encoder_2/config.json has no hidden_size, which {garbled}"
    )
    assert faults["unet/model.onnx"].endswith(f"has 0 for addition_time_embed_dim, which {garbled}")
    assert faults["tiny_vae_decoder/pixels.onnx"] == (
        f"bundle {foreign}, part tiny_vae_decoder: tiny_vae_decoder/config.json has 3 for block_out_channels, which "
        "must be a list of 1 to 8 numbers, one a level; copy or export the bundle again"
    )
    assert 'has "none" for scaling_factor, which must be a number above 0' in faults["vae_decoder/pixels.onnx"]
    assert 'has "low" for beta_start, which must be a number above 0 and below 1' in faults["scheduler"]


def test_a_manifest_that_lacks_a_part(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vega_edge.verify._fault", lambda engine, smoke: "")
    told = json.loads((copy / MANIFEST).read_text())
    del told["parts"]["text_encoder"]
    (copy / MANIFEST).write_text(json.dumps(told))
    checks = [check for check in verify(copy, "onnxruntime-cpu").checks if check.fault]
    assert [(c.graph, c.fault) for c in checks] == [("text_encoder/model.onnx", "the manifest does not list it")]


def test_what_is_told() -> None:
    checks = (
        Check("unet/model.onnx", "fp16", "int8", 7_400_000, 0.25, ""),
        Check("b/x.onnx", "", "", 10, 1.0, "bad", "export it"),
    )
    verdict = Verdict("here", "mine", "onnxruntime-cpu", 0, checks)
    assert render(verdict).splitlines() == [
        "graph            dtype, weights    size   time",
        "unet/model.onnx  fp16, int8      7.4 MB  0.2 s  ok",
        "b/x.onnx         not said        0.0 MB  1.0 s  bad",
        "mine on onnxruntime-cpu: no manifest: nothing to compare with; 1 of 2 checks failed",
    ]
    with pytest.raises(EngineError) as caught:
        raise_for(verdict)
    assert str(caught.value) == "bundle here, b/x.onnx: bad; export it"


def test_an_engine_that_can_not_run_here_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[str]:
        raise EngineError("the NVIDIA driver shows no GPU")

    monkeypatch.setattr(nvidia, "devices", none)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=__file__))
    with pytest.raises(EngineError) as caught:
        verify(find_bundle("demo-vegart"), "tensorrt-rtx")
    assert str(caught.value) == (
        "engine tensorrt-rtx: the NVIDIA driver shows no GPU; install NVIDIA's driver, or use another engine"
    )


def test_what_a_built_engine_says_to_do_is_all_there_is_to_do(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    def lacking(*_: object) -> Engine:
        raise EngineError("no engine of it can be used here: none has been built; run: vega-edge build X")

    monkeypatch.setattr("vega_edge.verify.check_engine", lambda *a: None)
    monkeypatch.setattr("vega_edge.verify.open_engine", lambda *a, **k: lacking())
    told = {}
    for engine in ("tensorrt-rtx", "onnxruntime-cpu"):
        with pytest.raises(EngineError) as caught:
            raise_for(verify(copy, engine))
        told[engine] = str(caught.value).partition("built; ")[2]
    assert told == {
        "tensorrt-rtx": "run: vega-edge build X",
        "onnxruntime-cpu": "run: vega-edge build X; export the bundle again",
    }


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

    monkeypatch.setattr("vega_edge.verify.check_engine", lambda *a: None)
    monkeypatch.setattr("vega_edge.verify.open_engine", lambda path, *a, **k: Recorder(path))
    monkeypatch.setattr("vega_edge.verify.built_shapes", lambda path, *a: built[path.parent.name])
    verdict = verify(find_bundle("demo-vegart"), "tensorrt-rtx")
    assert [check.fault for check in verdict.checks] == [""] * 9  # tokenizers and scheduler too
    assert set(seen) == {f"{part}/{'pixels' if 'decoder' in part else 'model'}.onnx" for part in built}
    for graph, shapes in seen.items():
        assert built[graph.split("/")[0]].items() <= shapes.items()
        assert {shape[0] for name, shape in shapes.items() if name != "timestep"} == {2}
