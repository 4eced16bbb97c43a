"""Which cells of name × option × prediction × steps are compared with a reference, and which can't be, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vega_edge.runtime.schedulers import Scheduler, all_schedulers

from . import fakes

DATA = Path(__file__).parent / "data" / "samplers.npz"
SHAPE = (2, 2, 2, 2)
STEPS = (1, 2, 4, 5, 10, 25, 61, 100)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "karras": {"use_karras_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    # each of these at fewer steps, for the rows that know them
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "lower final": {"final_sigmas_type": "sigma_min", "lower_order_final": True},
    "full final": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "euler final": {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    "third order": {"solver_order": 3},
    "first order": {"solver_order": 1},
    "alpha one": {"set_alpha_to_one": True},
    "offset 0": {"steps_offset": 0},
    "eta": {},  # a half
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
FEWER_STEPS = (4, 10, 25)
_SPACED = {"Euler", "Heun", "LMS", "DPM2", "DPM2 a", "DPM Multi", "DPM Single", "UniPC"}  # with use_..._sigmas
_SOLVERS = {"DPM Multi", "DPM Single", "UniPC"}
_KNOWN_TO = {
    "karras": _SPACED, "exponential": _SPACED, "beta": _SPACED,
    "sigma_min": {"Euler", *_SOLVERS}, "lower final": {"DPM Single"}, "full final": {"DPM Multi"},
    "euler final": {"DPM Multi"}, "third order": _SOLVERS, "first order": _SOLVERS,
    "alpha one": {"DDIM", "PNDM"}, "offset 0": {"Euler", "DDIM", "PNDM", "DPM Multi"},
    "eta": {"DDIM", "TCD"},
    # those whose class doesn't know it among them: they keep the plain betas
    "zero snr": {
        "Euler", "Euler a", "DDIM", "DDPM", "LCM", "TCD", "DPM Multi", "UniPC", "DPM Single", "Heun", "DPM2", "DPM2 a",
        "LMS", "PNDM",
    },
}  # fmt: skip
_NO_SAMPLE = ("Euler a", "DPM2", "DPM2 a", "DPM2 Karras", "DPM2 a Karras", "PNDM")
# Where the reference is k-diffusion: what A1111 has beside it is in test_a1111.py.
_OTHERS = ("Restart", "DDIM", "PLMS", "UniPC", "LCM", "TCD", "Euler Lightning")


@dataclass(frozen=True)
class Cell:
    row: Scheduler
    option: str
    prediction: str
    steps: int

    @property
    def scheduler(self) -> Scheduler:
        return self.row if self.eta is None else self.row.with_eta(self.eta)

    @property
    def eta(self) -> float | None:
        return 0.5 if self.option == "eta" else None

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def family(self) -> str:
        return self.row.family

    @property
    def config(self) -> dict[str, Any]:
        return {**fakes.VEGA, **OPTIONS[self.option], "prediction_type": self.prediction}

    @property
    def tolerance(self) -> float:
        """Relative. DDIM and its kin keep a terminal SNR of exactly zero in diffusers, 2^-24 here."""
        kept_zero = self.family == "diffusers" and self.name in ("DDIM", "DDPM", "LCM")
        return 5e-4 if self.option == "zero snr" and kept_zero else 1e-4

    def __str__(self) -> str:
        return f"{self.family}/{self.name}/{self.option}/{self.prediction}/{self.steps}"


def excluded(cell: Cell) -> str | None:
    """Why a cell that would be in the product is not compared."""
    name, steps = cell.name, cell.steps
    if cell.family == "a1111":
        if cell.prediction == "sample":
            return "k-diffusion has no denoiser for it"
        if steps == 1 and ("2M SDE" in name or "3M SDE" in name):
            return "k-diffusion's function fails at one step, on a local that it never set"
        return None
    if cell.prediction == "sample" and name in _NO_SAMPLE:
        return "diffusers' class doesn't implement sample prediction"
    if name in ("LCM", "TCD") and steps > 50:
        return "distilled on 50 steps: both refuse more"
    spacing = "trailing" if name == "Euler Lightning" else cell.config["timestep_spacing"]
    if spacing == "trailing" and steps == 61 and name not in ("LCM", "TCD", "DPM Single"):
        return "diffusers' arange gives 62 steps, the last at timestep -1; ours gives 61"
    return None


def cells() -> Iterator[Cell]:
    for row in all_schedulers():
        if row.family == "a1111":
            if row.name not in _OTHERS:
                yield from (Cell(row, "default", p, n) for p in PREDICTIONS for n in STEPS)
                if row.eta is not None:
                    yield from (Cell(row, "eta", "epsilon", n) for n in FEWER_STEPS)
            continue
        for option in OPTIONS:
            full = option in ("default", "karras", "trailing", "linspace")
            if option in _KNOWN_TO and row.name not in _KNOWN_TO[option]:
                continue
            if not full and option == "zero snr":
                yield from (Cell(row, option, "v_prediction", n) for n in FEWER_STEPS)
                continue
            yield from (Cell(row, option, p, n) for p in PREDICTIONS for n in (STEPS if full else FEWER_STEPS))


def compared() -> list[Cell]:
    return [cell for cell in cells() if not excluded(cell)]


def stored() -> dict[str, np.ndarray]:
    """By a cell's text, what its reference ended with."""
    with np.load(DATA) as data:
        return dict(zip(data["cells"].tobytes().decode().split("\n"), data["latents"], strict=True))


def noise_for(steps: int) -> list[np.ndarray]:
    """The first is what the walk starts from. As many as any sampler draws; adaptive ones draw by their own count."""
    rng = np.random.default_rng(steps)
    return [rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2 * steps + 40)]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())
