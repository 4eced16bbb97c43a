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

_FEW_STEPS = 8  # what distilled models are drawn with at most
Schema = Mapping[str, Mapping[str, Any]]
# What our own addresses begin with; POST /{slug} must never mean one of them.
OWN_NAMES = frozenset(
    {"docs", "favicon.ico", "generations", "healthz", "live", "metrics", "openapi.json", "page", "readyz", "v1", "v2"}
)


@dataclass(frozen=True)
class Entry:
    """parameters: a JSON schema for each, as the slug's API page has them, or as the model's own limits say where it has
    no page. stand_in: the user's alias for another model, which does what comes nearest. own: the parameters of which a
    stand-in takes its own defaults whatever is asked: those of a model of few steps mean nothing to one of many.
    """

    slug: str
    recipe: Recipe
    parameters: Schema
    example: Mapping[str, Any]
    has_page: bool = False
    stand_in: bool = False
    own: frozenset[str] = frozenset()

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
        if slug in OWN_NAMES:
            raise UsageError(f"--alias: {slug!r} is an address of the server's own; choose another name")
        entries[slug] = _stand_in(slug, recipes[model], pages.get(slug))
    return entries


def _stand_in(slug: str, recipe: Recipe, page: Mapping[str, Any] | None) -> Entry:
    parameters = own_parameters(recipe)
    if page is None:
        return Entry(slug, recipe, parameters, {"prompt": "a big red star"}, stand_in=True)
    of_few = page["parameters"]["num_inference_steps"]["default"] <= _FEW_STEPS
    same_kind = of_few == (recipe.defaults["steps"] <= _FEW_STEPS)
    own = frozenset() if same_kind else frozenset({"num_inference_steps", "guidance_scale", "scheduler"})
    return Entry(slug, recipe, parameters, page["example"], stand_in=True, own=own)


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
