"""vega-edge: an edge runtime for Segmind's distilled text-to-image models.

from vega_edge import Pipeline
pipe = Pipeline.open("demo-vegart")
pipe("a big red star on a blue background", seed=7).images[0].save("star.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "VegaEdgeError", "__version__"]

if TYPE_CHECKING:
    from .errors import VegaEdgeError
    from .runtime.pipeline import Pipeline


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import vega_edge` costs next to nothing."""
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    if name == "VegaEdgeError":
        from .errors import VegaEdgeError

        return VegaEdgeError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
