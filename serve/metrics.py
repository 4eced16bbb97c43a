"""What Prometheus reads at /metrics. One registry a server, so that two in a process don't mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from .memory import HAS_PROC, resident_bytes

_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_resident_memory_bytes and its like
        if not HAS_PROC:
            memory = Gauge(
                "process_resident_memory_bytes", "Resident memory; on macOS the most so far.", registry=registry
            )
            memory.set_function(resident_bytes)
        GCCollector(registry=registry)
        self._stages = Histogram(
            "vega_edge_stage_seconds", "Time of a picture's stages: queue, text, denoise, decode, encode, draw, total.",
            ["model", "stage"], buckets=_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._pictures = Counter("vega_edge_pictures", "Pictures drawn.", ["model"], registry=registry)
        self._batches = Counter(
            "vega_edge_batches", "Batches drawn, by the pictures in them.", ["pictures"], registry=registry
        )
        self._errors = Counter("vega_edge_errors", "What failed, by kind.", ["kind"], registry=registry)
        self._swaps = Histogram(
            "vega_edge_model_swap_seconds", "Time to open or to close a model.", ["model", "action"],
            buckets=_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._responses = Counter("vega_edge_responses", "HTTP answers.", ["route", "status"], registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when asked for."""
        Gauge(f"vega_edge_{name}", text, registry=self.registry).set_function(value)

    def drew(self, model: str, seconds: Mapping[str, float], pictures: int) -> None:
        for stage, taken in seconds.items():
            self.stage(model, stage, taken)
        self._pictures.labels(model).inc(pictures)

    def batch(self, pictures: int) -> None:
        self._batches.labels(str(pictures)).inc()

    def stage(self, model: str, stage: str, seconds: float) -> None:
        self._stages.labels(model, stage).observe(seconds)

    def error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def swap(self, action: str, model: str, seconds: float) -> None:
        self._swaps.labels(model, action).observe(seconds)

    def response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
