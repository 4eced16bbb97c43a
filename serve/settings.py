"""What `vega-edge serve` was told, checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

LIMITS = ("local", "segmind")
BODY_BYTES = 64 * 1024
BODY_S = 10.0  # a body must have arrived by then
# how long a status poll is held open, and for those who ask for more: the SDK reads for 30
HOLD_S, MOST_HOLD_S = 1.0, 20.0
CREDITS = 1_000_000.0  # nothing is charged here; clients want a number
_DAY_S = 86_400
_RANGES: Mapping[str, tuple[str, int, int]] = {  # the flag, the least and the most
    "port": ("--port", 0, 65535),
    "queue": ("--queue", 1, 100_000),
    "rate": ("--rate", 0, 1_000_000),
    "sockets": ("--sockets", 1, 10_000),
    "prompt_chars": ("--prompt-chars", 1, BODY_BYTES),
    "batch": ("--batch", 1, 64),
    "job_s": ("--job-seconds", 1, _DAY_S),
    "grace_s": ("--grace-seconds", 0, _DAY_S),
    "keep_s": ("--keep-seconds", 1, 365 * _DAY_S),
}


@dataclass(frozen=True)
class Settings:
    """data: where jobs and pictures live. engine, device, memory, vae: of `Pipeline.open`, for every model. loras: of
    it too, by the model's name. aliases: slug -> a model's name. rate: pictures that each key may ask for in a minute, 0 for no
    limit. job_s: device time for one job. grace_s: for the running picture when stopping. keep_s: how long a finished
    job and its pictures are kept. hosts: names by which the server is called, beside addresses, localhost and the
    machine's own.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    device: str | None = None
    memory: str = "normal"
    vae: str = "full"
    loras: Mapping[str, Sequence[tuple[Path, float]]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    limits: str = "local"
    api_keys: Path | None = None
    no_auth: bool = False
    hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    queue: int = 64
    prompt_chars: int = 4000
    rate: int = 600
    sockets: int = 64
    connections: int = 512
    job_s: float = 300.0
    grace_s: float = 30.0
    keep_s: float = 3600.0
    batch: int = 4
    preload: tuple[str, ...] = ()
    memory_budget: int | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.limits not in LIMITS:
            raise UsageError(f"--limits must be one of {', '.join(LIMITS)}, got {self.limits!r}")
        if not is_loopback(self.host) and not (self.api_keys or self.no_auth):
            raise UsageError(
                f"others can reach {self.host}; give --api-keys FILE (make one: vega-edge serve keys add NAME --api-keys FILE), or say --no-auth"
            )
        if self.api_keys and self.no_auth:
            raise UsageError("--api-keys and --no-auth exclude each other; leave one of them out")
        for name, (flag, least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # which NaN is not either
                raise UsageError(f"{flag} must be from {least} to {most}, got {value}")
        for name in self.hosts:
            if not _is_name(name):
                raise UsageError(
                    f"--allow-host must be a name alone, such as draw.example, without a port or http://, got {name!r}"
                )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise UsageError(f"--trusted-proxy must be an address or a network, got {proxy!r}") from None


def _is_name(text: str) -> bool:
    """A host's name as browsers send it, in ASCII. Addresses need not be allowed, but may be."""
    return re.fullmatch(r"[A-Za-z0-9_.-]+", text) is not None or _is_address(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
