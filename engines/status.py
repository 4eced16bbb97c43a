"""Every engine's state on this machine, for `vega-edge doctor`. Imports each backend to see whether it works."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from ..errors import VegaEdgeError
from . import nvidia
from .checked import reason
from .choice import ENGINES, install_line, missing_here


@dataclass(frozen=True)
class EngineStatus:
    """If not `ok`, `why_not` says why and `install` what to do, if anything can be done; the others are then ''."""

    name: str
    ok: bool
    version: str = ""
    device: str = ""
    why_not: str = ""
    install: str = ""


def available() -> list[EngineStatus]:
    return [_status(name) for name in ENGINES]


def _status(name: str) -> EngineStatus:
    missing = missing_here(name)
    if missing is not None:
        return EngineStatus(name, False, why_not=missing.why, install=missing.cure)
    backend = ENGINES[name]
    try:
        module = import_module(f".{backend.module}", __package__)
        device = module.device(backend.setting)
        if device == "GPU":
            device = ", ".join(nvidia.devices())
        return EngineStatus(name, True, module.version(backend.setting), device)
    except Exception as failure:  # a broken installation raises anything; the doctor reports it
        # An error of ours says what to do itself; a package that does not even import is best installed again.
        cure = "" if isinstance(failure, VegaEdgeError) else install_line(backend.extra)
        return EngineStatus(name, False, why_not=reason(failure), install=cure)
