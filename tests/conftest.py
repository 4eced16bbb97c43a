"""Until the embedded model's trained weights are in the repository, the tests run on the same networks, untrained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vega_edge.models import recipes


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped, with the reason, where there is none")
    config.addinivalue_line("markers", "full: needs full-size bundles and gigabytes of memory; part of make test-full")


TRAINED = recipes()["demo-vegart"].ready
needs_training = pytest.mark.skipif(not TRAINED, reason="the embedded model is not trained in this checkout yet")


@pytest.fixture(scope="session", autouse=True)
def embedded_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where there is no trained bundle, exports an untrained one to where `Pipeline.open("demo-vegart")` looks."""
    if TRAINED:
        yield
        return
    home = tmp_path_factory.mktemp("home")
    make_untrained(home)
    before = os.environ.get("VEGA_EDGE_HOME")
    os.environ["VEGA_EDGE_HOME"] = str(home)
    yield
    del os.environ["VEGA_EDGE_HOME"]
    if before is not None:
        os.environ["VEGA_EDGE_HOME"] = before


def make_untrained(home: Path) -> None:
    torch = pytest.importorskip("torch")
    from vega_edge.demo.train.autoencoder import new_autoencoder
    from vega_edge.demo.train.checkpoints import write_checkpoint
    from vega_edge.demo.train.models import new_vega
    from vega_edge.export import export_bundle

    torch.manual_seed(0)
    checkpoint, vae = home / "checkpoint", home / "vae"
    new_autoencoder().save_pretrained(vae)
    write_checkpoint(checkpoint, "vega", new_vega(), vae)
    recipe = recipes()["demo-vegart"]
    (home / "bundles").mkdir()
    export_bundle(
        checkpoint, home / "bundles" / recipe.name, weights="fp16", **{**recipe.export_options(), "loras": ()}
    )
