"""What fp8 is scaled by, kept beside the engines: measuring it takes minutes, and each target and size takes the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..engines.plan_store import RANGES, Plan, PlanStore, part_of
from .trt_graph import Ranges

_METHOD = 1  # of measuring, raised where the same graph would give other numbers


def kept_ranges(store: PlanStore, plan: Plan, measure: Callable[[], Ranges]) -> Ranges:
    """Those of `plan`'s graph with its LoRAs: kept ones, or what `measure` finds, which are kept then."""
    told = json.dumps([_METHOD, [asdict(lora) for lora in plan.loras]])
    name = f"{part_of(plan.graph)}.{plan.graph_hash[:16]}.{hashlib.sha256(told.encode()).hexdigest()[:16]}{RANGES}"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged
        return _read(store.folder / name)
    found = measure()
    store.write(store.folder / name, json.dumps(found).encode())
    return found


def _read(path: Path) -> Ranges:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(v, float) and 0 <= v < math.inf for v in found.values()):
        raise ValueError(f"{path} holds no ranges")
    return found
