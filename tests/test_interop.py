"""With optimum-onnx: its exports open here, ours open there, and the pictures are the same. `make test-interop`.

optimum-onnx 0.1.0 needs a transformers older than ours, so it lives in an environment of its own, whose interpreter is
named by VEGA_EDGE_OPTIMUM_PYTHON (`make env-interop` makes one). Skipped where that is not set.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

PEER = os.environ.get("VEGA_EDGE_OPTIMUM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PEER, reason="VEGA_EDGE_OPTIMUM_PYTHON is not set: run make test-interop")
torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from vega_edge.bundle import Bundle  # noqa: E402
from vega_edge.export import export_bundle  # noqa: E402
from vega_edge.export.checkpoint import published_name  # noqa: E402
from vega_edge.runtime.pipeline import Pipeline  # noqa: E402

from .checkpoints import make_checkpoint  # noqa: E402

HERE = Path(__file__).parent
REQUEST = json.loads((HERE / "interop.json").read_text())


def peer(*arguments: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [PEER, str(HERE / "interop_peer.py"), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def drawn_here(bundle: Path) -> NDArray[np.uint8]:
    pipe = Pipeline.open(bundle, "onnxruntime-cpu")
    image = pipe(
        REQUEST["prompt"], steps=REQUEST["steps"], guidance=REQUEST["guidance"], width=REQUEST["size"],
        height=REQUEST["size"], seed=REQUEST["seed"], scheduler="Euler", family="diffusers",
    ).images[0]  # fmt: skip
    pipe.close()
    return np.asarray(image)


def drawn_there(bundle: Path, out: Path) -> NDArray[np.uint8]:
    peer("draw", bundle, out)
    return np.rint(np.load(out)[0] * 255).astype(np.uint8)


@pytest.fixture(scope="module", params=["sd", "xl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("interop") / request.param, sdxl=request.param == "xl")
    for part in folder.glob("text_encoder*"):  # transformers 5 saves other names than are published, which 4 needs
        file = part / "model.safetensors"
        tensors = {published_name(part.name, name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("safety_checker", None)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_exports_of_optimum_open_here_and_ours_there(checkpoint: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peer("export", checkpoint, theirs)
    export_bundle(checkpoint, ours)
    assert Bundle.open(theirs).manifest is None
    pictures = {
        "ours here": drawn_here(ours),
        "theirs here": drawn_here(theirs),
        "ours there": drawn_there(ours, tmp_path / "ours.npy"),
        "theirs there": drawn_there(theirs, tmp_path / "theirs.npy"),
    }
    assert pictures["ours here"].std() > 5
    for name, picture in pictures.items():
        difference = np.abs(picture.astype(int) - pictures["ours here"])
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02, name
