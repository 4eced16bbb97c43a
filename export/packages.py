"""Is what export needs installed? Said in one line, before anything that needs it is imported."""

from __future__ import annotations

import importlib.util

from ..errors import ExportError


def require(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f'export needs {", ".join(missing)}, not installed here; install: pip install "vega-edge[export]"'
        )
