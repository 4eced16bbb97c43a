"""Traces kept for the next export of the same network: a third of an export's time, where a test makes many.

A trace holds no weights (`export.graphs.trace`), so exports that differ in storage, in LoRAs or in seed have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vega_edge.export.graphs import GraphSpec, Traced

Key = tuple[Any, ...]
UNTRACED = ("_name_or_path", "sample_size", "scaling_factor", "force_upcast")  # settings that no forward() reads


def keeping(trace: Callable[..., Traced], kept: dict[Key, Traced]) -> Callable[..., Traced]:
    """Return `trace` with a memory: what `kept` holds is copied, what it lacks is traced and kept.

    The key is what a trace depends on: the modules and their settings, the parameters' shapes and types, the inputs.
    """

    def traced(part: str, wrapper: Any, spec: GraphSpec, feeds: Mapping[str, Any], arithmetic: str = "fp32") -> Traced:
        parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in wrapper.named_parameters())
        inputs = tuple((name, tuple(feed.shape), feed.dtype) for name, feed in feeds.items())
        config: Any = getattr(wrapper.model, "config", {})
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        key = (
            part, repr(wrapper), repr({k: v for k, v in settings.items() if k not in UNTRACED}), repr(spec), parameters,
            inputs, arithmetic,
        )  # fmt: skip
        if key not in kept:
            kept[key] = trace(part, wrapper, spec, feeds, arithmetic)
        return copied(kept[key])

    return traced


def copied(traced: Traced) -> Traced:
    """Return a copy that can be written to without changing the first."""
    model = traced.model.clone()
    inputs = {value.name: value for value in model.graph.inputs}
    return Traced(model, {name: inputs[value.name] for name, value in traced.parameters.items()})
