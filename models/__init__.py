"""Recipes: one JSON file a model, saying where it comes from, its defaults and its limits. Data, reviewed like code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import records
from ..errors import BundleError, unknown

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RecipeLora:
    file: str
    strength: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Paths are relative to the package. `checkpoint` is there in a clone of the project, `bundle` in every install.

    defaults: scheduler, steps, guidance, width, height, and any other of `runtime.request.Request`, such as the family
    that a scheduler's name is of (diffusers, if not said). limits: steps, guidance, size_px as [least, most].
    """

    name: str
    title: str
    licence: str
    checkpoint: str
    defaults: Mapping[str, Any]
    limits: Mapping[str, Any]
    loras: tuple[RecipeLora, ...] = field(default_factory=tuple)
    bundle: str | None = None

    @property
    def checkpoint_path(self) -> Path:
        return _PACKAGE / self.checkpoint

    @property
    def lora_paths(self) -> list[tuple[Path, float]]:
        return [(_PACKAGE / lora.file, lora.strength) for lora in self.loras]

    def export_options(self) -> dict[str, Any]:
        """What `export_bundle` is told of the recipe beside its checkpoint."""
        return {"name": self.name, "loras": self.lora_paths, "defaults": self.defaults, "limits": self.limits}

    @property
    def bundle_path(self) -> Path:
        """Where the bundle is, or where `vega-edge export NAME` puts it."""
        exported = bundles_folder() / self.name  # the user's own export goes before the one that came with the package
        packaged = _PACKAGE / self.bundle if self.bundle else exported
        return packaged if packaged.is_dir() and not exported.is_dir() else exported

    @property
    def ready(self) -> bool:
        return self.bundle_path.is_dir()

    @property
    def cure(self) -> str:
        """What to do where it is not ready."""
        if self.checkpoint_path.is_dir():
            return f"make it with: vega-edge export {self.name}"
        return "its checkpoint is not part of this install"


def bundles_folder() -> Path:
    """VEGA_EDGE_HOME/bundles, or ~/.cache/vega-edge/bundles."""
    home = os.environ.get("VEGA_EDGE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "vega-edge") / "bundles"


def recipes() -> dict[str, Recipe]:
    """All of them by name; the file is named after the recipe."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.json")):
        recipe = records.decode(Recipe, records.parse(path.read_text(encoding="utf-8")))
        found[recipe.name] = recipe
    return found


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """The bundle's folder for a recipe's name, or a path to one; a name without a bundle says how to make it."""
    text = os.fspath(name_or_path)
    recipe = recipes().get(text)
    if recipe is None:
        if os.path.isdir(text) or "/" in text or os.sep in text:
            return Path(text)
        raise unknown("model", text, recipes())
    if not recipe.ready:
        raise BundleError(f"{text} has no bundle at {recipe.bundle_path} yet; {recipe.cure}")
    return recipe.bundle_path
