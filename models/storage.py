"""Where models lie on this disk: our own folders, and the hub's cache, which other programs share."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError, VegaEdgeError

HOME_VARIABLE = "VEGA_EDGE_HOME"


def home() -> Path:
    """VEGA_EDGE_HOME, or ~/.cache/vega-edge; an absolute path. Raises VegaEdgeError if the system knows no home folder."""
    return folder_named_by(HOME_VARIABLE) or _of_the_user() / ".cache" / "vega-edge"


def folder_named_by(variable: str) -> Path | None:
    """The absolute path of the folder that an environment variable names, `~` expanded; None if it is not set or empty."""
    chosen = os.environ.get(variable)
    if not chosen:
        return None
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as failure:
        raise UsageError(
            f"{variable} is {chosen!r}, and there is no such user's home; give the path itself"
        ) from failure


def _of_the_user() -> Path:
    try:
        return Path.home()
    except RuntimeError as failure:
        raise VegaEdgeError(
            f"this user has no home folder; set {HOME_VARIABLE} to a folder for what is kept"
        ) from failure


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
        if chosen := folder_named_by(variable):
            return chosen / below
    return (folder_named_by("XDG_CACHE_HOME") or _of_the_user() / ".cache") / "huggingface" / "hub"


def downloaded_bytes(repository: str) -> int:
    """What the hub's cache holds of a repository, OWNER/NAME; files that are still on their way are not counted."""
    blobs = hub_cache() / f"models--{repository.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*") if path.suffix != ".incomplete")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
