"""Whether a checkpoint's `scheduler_config.json` is one that the runtime can draw with: the runtime itself decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError, UsageError
from ..runtime.scheduler_config import as_pipelines_read, check_drawable, fault_in

_SHOWN = 60  # characters of a value


def check_schedule(path: Path, config: Mapping[str, Any], sdxl: bool, defaults: Mapping[str, Any]) -> None:
    """ExportError for a value that can't be used, and for a scheduler or noise levels that are not implemented.

    defaults: the bundle's; a scheduler among them goes before the one that the file names.
    """
    if fault := fault_in(config):
        text = json.dumps(fault.got)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise ExportError(f"{path}: {fault.key} is {shown}, which must be {fault.wanted}; fetch it again")
    cure = "change _class_name there to one that is"
    try:
        check_drawable(as_pipelines_read(config, sdxl), defaults, cure)
    except UsageError as failure:
        raise ExportError(f"{path} can't be drawn with: {failure}") from failure
