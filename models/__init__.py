"""Recipes: one JSON file a model, saying where it comes from, its defaults and its limits. Data, reviewed like code.

The networks' exact shapes are in `configs/` (see `architectures.py`), what is on this disk in `storage.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import records
from ..errors import BundleError, unknown
from .architectures import Architecture, architectures
from .storage import bundles_folder, checkpoints_folder, compiled_folder

__all__ = [
    "Architecture",
    "Origin",
    "Recipe",
    "RecipeLora",
    "architectures",
    "bundles_folder",
    "checkpoints_folder",
    "compiled_folder",
]
__all__ += ["find_bundle", "recipes"]
_PACKAGE = Path(__file__).resolve().parent.parent
_HALF_BYTES = 2  # what published checkpoints store a weight in


@dataclass(frozen=True)
class Origin:
    """Where weights come from. hub: a repository, OWNER/NAME, at `revision` (a whole commit hash) where one is known,
    else at its head; file: one file of it, a single-file checkpoint, else a diffusers folder. file without hub: what
    the user must have, in `checkpoints_folder()`.
    """

    hub: str | None = None
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.hub is None:
            return f"{checkpoints_folder() / (self.file or '')}"
        revision = f"@{self.revision[:7]}" if self.revision else ""
        return f"hf:{self.hub}{revision}" + (f"/{self.file}" if self.file else "")


@dataclass(frozen=True)
class RecipeLora:
    """`file` is in the hub's repository `hub`, or, without one, relative to the package."""

    file: str
    strength: float = 1.0
    hub: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Paths are relative to the package. `checkpoint` is there in a clone of the project, `bundle` in every install.

    sources: where there is no `checkpoint`, the first is exported; others are to name with --from. architecture: one of
    `configs/architectures.json`, None for the embedded models; scheduler: a file of `configs/` in place of the
    architecture's (for checkpoints without one). defaults: what the manifest of its bundle may hold: scheduler, family
    (what the scheduler's name means; diffusers, if not said), schedule, steps, guidance, width, height, prompt_syntax.
    limits: what this runtime allows, as [least, most]: steps, guidance, size_px. api_slugs: the model's name in Segmind's API first, then other spellings;
    api_limits: what its page allows: steps, guidance, samples as [least, most] and sizes_px, a list of all.
    parameters: how many weights each part has; left out of the file where the architecture says it.
    """

    name: str
    title: str
    licence: str
    defaults: Mapping[str, Any]
    limits: Mapping[str, Any]
    checkpoint: str | None = None
    sources: tuple[Origin, ...] = ()
    architecture: str | None = None
    scheduler: str | None = None
    loras: tuple[RecipeLora, ...] = field(default_factory=tuple)
    bundle: str | None = None
    api_slugs: tuple[str, ...] = ()
    api_limits: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def checkpoint_path(self) -> Path | None:
        return _PACKAGE / self.checkpoint if self.checkpoint else None

    @property
    def has_checkpoint(self) -> bool:
        """Is its checkpoint part of this install?"""
        return self.checkpoint_path is not None and self.checkpoint_path.is_dir()

    @property
    def lora_paths(self) -> list[tuple[Path, float]]:
        """Those that come with the project; those of the hub are fetched when it is exported."""
        return [(_PACKAGE / lora.file, lora.strength) for lora in self.loras if lora.hub is None]

    @property
    def hub_loras(self) -> list[RecipeLora]:
        return [lora for lora in self.loras if lora.hub is not None]

    @property
    def download_bytes(self) -> int:
        """Of the weights in half precision, as they are published; 0 where nothing is downloaded."""
        return sum(self.parameters.values()) * _HALF_BYTES if any(origin.hub for origin in self.sources) else 0

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
        if self.has_checkpoint or self.sources:
            return f"make it with: vega-edge export {self.name}"
        return "its checkpoint is not part of this install"


def recipes() -> dict[str, Recipe]:
    """All of them by name; the file is named after the recipe."""
    found, known = {}, architectures()
    for path in sorted(Path(__file__).parent.glob("*.json")):
        recipe = records.decode(Recipe, records.parse(path.read_text(encoding="utf-8")))
        if recipe.architecture:
            recipe = replace(recipe, parameters=known[recipe.architecture].parameters)
        found[recipe.name] = recipe
    return found


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """The bundle's folder for a recipe's name, or a path to one; a name without a bundle says how to make it."""
    text = os.fspath(name_or_path)
    recipe = recipes().get(text)
    if recipe is None:
        if os.path.isdir(text) or "/" in text or os.sep in text:
            path = Path(text)
            return path.absolute() if str(path) in recipes() else path  # "./NAME", which loses its "./", is not NAME
        raise unknown("model", text, recipes())
    if not recipe.ready:
        raise BundleError(f"{text} has no bundle at {recipe.bundle_path} yet; {recipe.cure}")
    return recipe.bundle_path
