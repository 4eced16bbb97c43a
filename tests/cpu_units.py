"""This CPU's arithmetic, where it decides what a library's results are worth."""

from __future__ import annotations

from vega_edge.bench.machine import cpu_flags


def saturates(engine: str, dtype: str) -> bool:
    """Return whether `engine` adds pairs of 8-bit products in 16 bits, as OpenVINO does on a CPU without VNNI."""
    return dtype == "int8" and engine.startswith("openvino") and not {"avx512_vnni", "avx_vnni"} & {*cpu_flags()}
