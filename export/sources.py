"""What to export, by any of its names: a recipe, a diffusers folder, a single file, a hub repository, random weights.

Nothing is opened, fetched or written before `open`, so that an export can refuse its other arguments first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ExportError, UsageError
from ..models import Origin, Recipe, architectures
from ..models.storage import checkpoints_folder
from .checkpoint import Checkpoint, open_checkpoint, open_configs, with_weights
from .hub import fetch_file, fetch_folder, fetch_network
from .skeleton import skeleton_folder
from .weight_files import PICKLED

_HUB = re.compile(r"hf:(?P<hub>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?")
Lora = tuple[Path, float]
Place = Path | Origin


@dataclass(frozen=True)
class ModelSource:
    """place: a path or a hub's. name: as the manifest says it. random_weights: the seed, None for trained ones.
    defaults: the bundle's, whose scheduler the model must be able to be drawn with."""

    place: Path | Origin
    name: str
    recipe: Recipe | None = None
    allow_pickle: bool = False
    random_weights: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def open(self, tiny_vae: Path | None = None) -> Checkpoint:
        """Fetches what has to be fetched. CheckpointError and ExportError say in one line what is wrong."""
        if self.random_weights is not None:
            return self._random(self.random_weights, tiny_vae)
        place = self._found(self.place) if isinstance(self.place, Origin) else self.place
        if place.is_file():
            return self._single_file(place, tiny_vae)
        return open_checkpoint(place, tiny_vae, allow_pickle=self.allow_pickle, defaults=self.defaults)

    def _random(self, seed: int, tiny_vae: Path | None) -> Checkpoint:
        from .random_weights import RandomWeights

        if self.recipe and self.recipe.architecture:
            folder = skeleton_folder(architectures()[self.recipe.architecture], self.recipe.scheduler)
        elif isinstance(self.place, Path) and not self.place.is_file():
            folder = self.place
        else:
            raise UsageError(f"{self.name}: random weights need a model's name or a diffusers folder")
        checkpoint = self._configs(folder, tiny_vae)
        loader = RandomWeights(seed, checkpoint.configs)
        loaders = {part: loader for part in checkpoint.parts if part != "tiny_vae"}
        return replace(checkpoint, loaders=loaders, random_weights=seed)

    def _found(self, origin: Origin) -> Path:
        """Where it is on this disk, fetched if it has to be."""
        if origin.hub is None:
            return self._own_file(origin)
        if origin.file and origin.file.endswith(PICKLED) and not self.allow_pickle:
            raise _refused(str(origin))
        try:
            if origin.file:
                return fetch_file(origin)
            check = partial(open_configs, defaults=self.defaults)
            return fetch_folder(origin, allow_pickle=self.allow_pickle, check=check)
        except CheckpointError as failure:
            if self.recipe is None:
                raise
            raise CheckpointError(f"{failure}; weights that you have elsewhere are named with --from") from None

    def _own_file(self, origin: Origin) -> Path:
        path = checkpoints_folder() / str(origin.file)
        if not path.is_file():
            raise CheckpointError(
                f"{self.name} needs {path}, which can't be downloaded by name; put it there, or name it with --from FILE"
            )
        return path

    def _single_file(self, path: Path, tiny_vae: Path | None) -> Checkpoint:
        from .detect import detect
        from .single_file import SingleFile, file_shapes

        if path.suffix in PICKLED and not self.allow_pickle:
            raise _refused(str(path))
        if path.suffix not in (*PICKLED, ".safetensors"):
            raise ExportError(
                f"{path} is no checkpoint that is known; allowed are .safetensors and {', '.join(PICKLED)}"
            )
        shapes = file_shapes(path)
        found = detect(path, shapes, architectures())
        recipe = self.recipe
        if recipe and recipe.architecture and recipe.architecture != found.name:
            raise CheckpointError(
                f"{path} is of the architecture {found.name}, and {recipe.name} of {recipe.architecture}; leave the "
                "model's name out, or choose another file"
            )
        loader = SingleFile(path, found, shapes)
        loader.check()
        folder = skeleton_folder(found, recipe.scheduler if recipe else None)
        checkpoint = self._configs(folder, tiny_vae)
        files = dict.fromkeys(found.parts, (path,))
        return replace(
            checkpoint, loaders=dict.fromkeys(found.parts, loader), weight_files={**checkpoint.weight_files, **files}
        )

    def _configs(self, folder: Path, tiny_vae: Path | None) -> Checkpoint:
        """A folder whose weights are elsewhere; the tiny autoencoder has its own files all the same."""
        checkpoint = open_configs(folder, tiny_vae, self.defaults)
        return checkpoint if tiny_vae is None else with_weights(checkpoint, ["tiny_vae"])


def path_source(path: Path) -> ModelSource:
    """A diffusers folder or a single-file checkpoint."""
    return ModelSource(Path(path), Path(path).resolve().name)


def model_source(
    given: str | Path, *, start: str | None = None, allow_pickle: bool = False, random_weights: int | None = None
) -> ModelSource:
    """What the command line says: a recipe's name, a path, or hf:OWNER/NAME[@REVISION][/FILE].

    start: where a recipe's weights come from, in place of its own sources.
    """
    from ..models import recipes

    recipe = recipes().get(str(given))
    if start is not None and random_weights is not None:
        raise UsageError("--from names trained weights and --random-weights makes some up; leave one of them out")
    if start is not None and recipe is None:
        raise UsageError(f"--from goes with a model's name; {given} is none of: {', '.join(recipes())}")
    options = {"recipe": recipe, "allow_pickle": allow_pickle, "random_weights": random_weights}
    if recipe is None or start is not None:
        place = _place(str(start if start is not None else given))
        base = path_source(place) if isinstance(place, Path) else ModelSource(place, str(place).removeprefix("hf:"))
        return replace(base, **options)
    if recipe.has_checkpoint or not recipe.sources:
        if recipe.checkpoint_path is None or not recipe.has_checkpoint:
            raise ExportError(
                f"the checkpoint of {recipe.name} is not part of this install ({recipe.checkpoint_path} does not "
                "exist); export it in a clone of the project"
            )
        return ModelSource(recipe.checkpoint_path, recipe.checkpoint_path.name, **options)
    return ModelSource(recipe.sources[0], str(recipe.sources[0]).removeprefix("hf:"), **options)


def lora_places(source: ModelSource, own: Sequence[Lora] = ()) -> list[tuple[Place, float]]:
    """A recipe's LoRAs, each with its strength, then the user's own. Random weights have only those."""
    recipe = source.recipe
    if recipe is None or source.random_weights is not None:
        return list(own)
    on_hub = [(Origin(r.hub, r.revision, r.file), r.strength) for r in recipe.hub_loras]
    return [*recipe.lora_paths, *on_hub, *own]


def lora_file(place: Place) -> Path:
    """It, fetched if it is the hub's."""
    if isinstance(place, Path):
        return place
    try:
        return fetch_file(place)
    except CheckpointError as failure:
        raise CheckpointError(
            f"{failure}; it is a LoRA of the model: with a copy of it, export the base model with --lora FILE"
        ) from None


def tiny_vae_place(given: str) -> Place:
    """A tiny autoencoder, as the command line says it: its folder, or hf:OWNER/NAME[@REVISION]."""
    place = _place(given)
    if isinstance(place, Origin) and place.file is not None:
        raise UsageError(f"{given!r} names one file; a tiny autoencoder is a folder, or a repository: hf:OWNER/NAME")
    return place


def tiny_vae_folder(place: Place, *, allow_pickle: bool = False) -> Path:
    """It, fetched if it is the hub's."""
    return place if isinstance(place, Path) else fetch_network(place, "tiny_vae", allow_pickle=allow_pickle)


def _place(text: str) -> Path | Origin:
    if not text.startswith("hf:"):
        return Path(text)
    match = _HUB.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} names no hub repository; it is hf:OWNER/NAME, hf:OWNER/NAME@REVISION or .../FILE")
    return Origin(match["hub"], match["revision"], match["file"])


def _refused(what: str) -> ExportError:
    return ExportError(
        f"{what} is pickled, which can run any code when it is read; if you trust it, --allow-pickle reads it with "
        "torch's weights_only"
    )
