"""Where models lie on this disk: our own folders, and the hub's cache, which other programs share."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """VEGA_EDGE_HOME, or ~/.cache/vega-edge."""
    chosen = os.environ.get("VEGA_EDGE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vega-edge"


def bundles_folder() -> Path:
    """Where exports by a model's name go, and where the runtime looks for them."""
    return home() / "bundles"


def compiled_folder() -> Path:
    """Where engines keep what they compiled."""
    return home() / "compiled"


def checkpoints_folder() -> Path:
    """Where single-file checkpoints lie that can't be downloaded by name."""
    return home() / "checkpoints"


def hub_cache() -> Path:
    """The hub's cache, found by the environment variables that huggingface_hub documents (it need not be installed)."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if chosen := os.environ.get(variable):
            return Path(chosen).expanduser() / below
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "huggingface" / "hub"


def downloaded_bytes(repository: str) -> int:
    """What the hub's cache holds of a repository, OWNER/NAME; files that are still on their way are not counted."""
    blobs = hub_cache() / f"models--{repository.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*") if path.suffix != ".incomplete")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
