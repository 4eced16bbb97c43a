"""vega-edge: an edge runtime for Segmind's distilled text-to-image models.

from vega_edge import Pipeline
with Pipeline.open("demo-vegart") as pipe:
    pipe("a big red star on a blue background", seed=7).images[0].save("star.png")

What a call may say beside its prompt are the fields of `Request`; every error is a `VegaEdgeError`, drawn as a tree in
`vega_edge.errors`.
"""

from __future__ import annotations

from .telemetry import switch_off as _switch_off

_switch_off()  # before anything loads the libraries that would send it

TYPE_CHECKING = False  # type checkers take it for true, as typing's own, which costs more to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from .errors import (
        BundleError,
        CheckpointError,
        EngineError,
        ExportError,
        NotEnoughMemoryError,
        NotFiniteError,
        UsageError,
        VegaEdgeError,
    )
    from .runtime.pipeline import Pipeline, Result, Step
    from .runtime.request import Request

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "NotEnoughMemoryError",
    "NotFiniteError",
    "Pipeline",
    "Request",
    "Result",
    "Step",
    "UsageError",
    "VegaEdgeError",
    "__version__",
]
_MODULES = {"Pipeline": ".runtime.pipeline", "Result": ".runtime.pipeline", "Step": ".runtime.pipeline"}
_MODULES["Request"] = ".runtime.request"


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import vega_edge` costs next to nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES.get(name, ".errors"), __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
