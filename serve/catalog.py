"""Which name in an address means which model, with the parameters it takes. Names come from lists, never from paths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..errors import UsageError, VegaEdgeError, unknown
from ..models import Recipe
from ..runtime.request import MAX_SAMPLES
from ..runtime.rng import MAX_SEED

Schema = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """parameters: a JSON schema for each, as the slug's API page has them, or as the model's own limits say where it has
    no page. stand_in: the user's alias for another model, which does what comes nearest.
    """

    slug: str
    recipe: Recipe
    parameters: Schema
    example: Mapping[str, Any]
    has_page: bool = False
    stand_in: bool = False

    @property
    def ready(self) -> bool:
        return self.recipe.ready

    def require_ready(self) -> None:
        if not self.recipe.ready:
            raise VegaEdgeError(
                f"{self.slug}: the model {self.recipe.name} has no bundle here; {self.recipe.cure}, or let another stand in: --alias {self.slug}=MODEL"
            )


def catalog(aliases: Mapping[str, str]) -> dict[str, Entry]:
    """By slug: every recipe's name and API slugs; an alias goes before all of them."""
    recipes, pages = models.recipes(), api_pages()
    entries = {}
    for recipe in recipes.values():
        for slug in (recipe.name, *recipe.api_slugs):
            entries[slug] = _entry(slug, recipe, pages)
    for slug, model in aliases.items():
        if model not in recipes:
            raise unknown("model", model, recipes)
        if "/" in slug or not slug:
            raise UsageError(f"--alias must be SLUG=MODEL, and a slug has no slash, got {slug!r}")
        example = pages[slug]["example"] if slug in pages else {"prompt": "a big red star"}
        entries[slug] = Entry(slug, recipes[model], own_parameters(recipes[model]), example, stand_in=True)
    return entries


def live_models(entries: Iterable[Entry]) -> list[Recipe]:
    """Those with a bundle, the ones of few steps first: the first is what the live page begins with."""
    found = {entry.recipe.name: entry.recipe for entry in entries if entry.ready}
    return sorted(found.values(), key=lambda recipe: (recipe.defaults["steps"], recipe.name))


def api_pages() -> dict[str, Any]:
    """The parameters of Segmind's API pages by slug; where each comes from is in its "source"."""
    text = Path(__file__).with_name("api_pages.json").read_text(encoding="utf-8")
    pages: dict[str, Any] = json.loads(text)
    return pages


def own_parameters(recipe: Recipe) -> Schema:
    """A model's own defaults and limits, under the names of the API."""
    d = recipe.defaults
    side = {"type": "integer", **_between(recipe, "size_px")}
    return {
        "prompt": {"type": "string"},
        "negative_prompt": {"type": "string"},
        "num_inference_steps": {"type": "integer", "default": d["steps"], **_between(recipe, "steps")},
        "guidance_scale": {"type": "number", "default": d["guidance"], **_between(recipe, "guidance")},
        "scheduler": {"type": "string", "default": d["scheduler"]},
        "samples": {"type": "integer", "default": 1, "minimum": 1, "maximum": MAX_SAMPLES},
        "seed": {"type": "integer", "default": -1, "minimum": -1, "maximum": MAX_SEED},
        "img_width": {**side, "default": d["width"]},
        "img_height": {**side, "default": d["height"]},
        "base64": {"type": "boolean", "default": False},
    }


def _entry(slug: str, recipe: Recipe, pages: Mapping[str, Any]) -> Entry:
    """Other spellings of a model's name have the page that it has."""
    page = next((pages[name] for name in (slug, *recipe.api_slugs) if name in pages), None)
    if page is None:
        return Entry(slug, recipe, own_parameters(recipe), {"prompt": "a big red star"})
    return Entry(slug, recipe, page["parameters"], page["example"], has_page=True)


def _between(recipe: Recipe, name: str) -> dict[str, Any]:
    if name not in recipe.limits:
        return {}
    low, high = recipe.limits[name]
    return {"minimum": low, "maximum": high}
