"""`vega-edge serve --check`: what is wrong with the server's options, as far as that can be known without its port and
without a model's networks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import UsageError, VegaEdgeError
from ..models import recipes
from ..runtime.parts import cache_folder
from ..runtime.pipeline import Pipeline
from ..serve.listener import bound, reason
from ..serve.service import build
from ..serve.settings import Settings
from ..serve.store import Store


def check(settings: Settings) -> None:
    """VegaEdgeError for what a start with these settings would fail on, or serve without saying so."""
    service = build(settings)
    _check_host(settings.host)
    for folder in (settings.data, Store(settings.data).pictures):
        _check_folder(folder)
    cache_folder()
    for slug in settings.aliases:
        service.entries[slug].require_ready()
    preloaded = {service.entries[name].recipe.name for name in settings.preload}
    for name in sorted(preloaded | {name for name in settings.loras if recipes()[name].ready}):
        _check_model(name, settings)


def _check_host(host: str) -> None:
    try:
        bound(host, 0).close()  # any port that is free
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--host: can't listen on {host} ({reason(error)}); give an address of this machine, or 0.0.0.0 for all of them"
        ) from None


def _check_folder(folder: Path) -> None:
    """Makes nothing that stays: the server itself makes the folder, with its own permissions."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise VegaEdgeError(f"--data: {folder} can't be written: {error.strerror}; choose another folder") from None


def _check_model(name: str, settings: Settings) -> None:
    """With "low" memory no network is opened before something is drawn, so this is quick: files, LoRAs, decoder."""
    Pipeline.open(
        name, settings.engine, verify=False, memory="low", vae=settings.vae, device=settings.device,
        loras=settings.loras.get(name, ()),
    ).close()  # fmt: skip
