"""What `Pipeline.open` is given, checked before anything is read, and what a folder without our manifest is taken to say."""

from __future__ import annotations

import logging
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import UsageError
from ..manifest import MANIFEST

_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_log = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(f"model must be a model's name or a bundle's folder, got {model!r}")


def checked_loras(loras: Any) -> list[tuple[Path, float]]:
    """Pairs of a file and its strength; UsageError for anything else, a plain list of files among it."""
    pairs = None if isinstance(loras, (str, os.PathLike)) or not isinstance(loras, Iterable) else list(loras)
    if pairs is None:
        raise _no_loras(loras)
    found = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
            raise _no_loras(pair)
        path, strength = pair
        if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not math.isfinite(strength):
            raise UsageError(f"LoRA {path}: its strength is {strength!r}; it must be a finite number, 1 is as trained")
        found.append((Path(path).absolute(), float(strength)))
    return found


def _no_loras(got: object) -> UsageError:
    return UsageError(f"loras must be pairs of file and strength, such as [('style.safetensors', 0.8)], got {got!r}")


def foreign_defaults(scheduler: Mapping[str, Any], side_px: int) -> dict[str, Any]:
    """What diffusers' own pipelines assume, for a folder without our manifest or without defaults in it.

    No scheduler: it is looked for when a request names none, since the configuration's may not be implemented.
    """
    steps, guidance = (4, 0.0) if scheduler.get("_class_name") in _FEW_STEPS else (25, 7.5)
    return {"family": "diffusers", "steps": steps, "guidance": guidance, "width": side_px, "height": side_px}


def warn_of_no_manifest(bundle: Bundle, defaults: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """A bundle of ours whose manifest was lost draws, but not as it did: that is said."""
    if bundle.manifest is None:
        _log.warning(
            "%s has no %s: its files are not checked, and what is not asked for is %d steps, guidance %g, %dx%d px, %s; "
            "that is right if another tool made it, else copy or export the bundle again",
            bundle.path, MANIFEST, defaults["steps"], defaults["guidance"], defaults["width"], defaults["height"],
            scheduler.get("_class_name"),
        )  # fmt: skip
