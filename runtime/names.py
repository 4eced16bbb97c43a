"""Spellings: the many ways in which clients write a scheduler's name, brought to one."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What no rule below explains. Keys as `key` leaves them.
_ALIASES: Mapping[str, str] = {
    "dpmsolversde": "dpmppsde",  # diffusers' class for it
    "eulertrailing": "eulerlightning",
    "lightning": "eulerlightning",
    "dpmad": "dpmadaptive",
}


def key(name: str) -> str:
    """A name without case, punctuation and dialect: 'DPM++ 2M Karras', 'dpmpp_2m_karras' and 'k_dpmpp_2m_ka' are one.

    `++` is also written `pp`; A1111's aliases start with k_ and end in _ka and _exp; k-diffusion writes `ancestral`;
    diffusers' classes end in Scheduler or DiscreteScheduler, their files in _discrete.
    """
    text = name.strip().lower().replace("++", "pp").replace("plusplus", "pp").replace("ancestral", "a")
    text = re.sub(r"^(k|sample)[_\s]", "", text)
    text = re.sub(r"[_\s]ka$", "_karras", text)
    text = re.sub(r"[_\s]exp$", "_exponential", text)
    plain = re.sub(r"[^a-z0-9]", "", text)
    plain = re.sub(r"(discrete)?(scheduler)?$", "", plain)
    plain = re.sub(r"^dmpp", "dpmpp", plain)  # dmpp_2m: sent by an official client
    plain = plain.replace("ppsdea", "ppsde")  # dpmpp_sde_ancestral: likewise; it has no other form
    return _ALIASES.get(plain, plain)
