"""The same fake network and the same noise, through diffusers' schedulers and k-diffusion's samplers, and ours.

What the references end with is stored, so that this runs without torch; where torch is, a sample is made anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest

from . import fakes, sampler_cells
from .sampler_cells import Cell, compared, excluded, noise_for, relative

STORED = sampler_cells.stored()
GROUPS = sorted({(c.family, c.name, c.option) for c in sampler_cells.cells()})


def cells_of(family: str, name: str, option: str) -> Iterator[Cell]:
    return (c for c in compared() if (c.family, c.name, c.option) == (family, name, option))


@pytest.mark.parametrize(("family", "name", "option"), GROUPS)
def test_same_latents_as_the_reference(family: str, name: str, option: str) -> None:
    for cell in cells_of(family, name, option):
        got = fakes.walk(cell.scheduler, cell.config, cell.steps, noise_for(cell.steps)).latents
        assert relative(got, STORED[str(cell)]) < cell.tolerance, str(cell)


def test_what_is_stored_is_what_is_compared() -> None:
    assert list(STORED) == [str(cell) for cell in compared()]
    assert all(np.isfinite(latents).all() for latents in STORED.values())


def test_every_excluded_cell_has_a_reason() -> None:
    """Each reason excludes something, and no name is left without a cell."""
    reasons = {excluded(cell) for cell in sampler_cells.cells()}
    assert len(reasons - {None}) == 5
    assert {(c.family, c.name) for c in compared()} == {(c.family, c.name) for c in sampler_cells.cells()}


@pytest.mark.parametrize(("family", "name"), sorted({(family, name) for family, name, _ in GROUPS}))
def test_what_is_stored_is_what_the_reference_gives(family: str, name: str) -> None:
    pytest.importorskip("torch", reason="makes the references anew, which needs torch (the export extra)")
    pytest.importorskip("diffusers")
    if family == "a1111" and not importlib.util.find_spec("k_diffusion"):
        pytest.skip("needs k-diffusion, installed with --no-deps")
    from . import references

    for cell in [c for c in compared() if (c.family, c.name) == (family, name) and c.steps == 4][::4]:
        # With zero SNR the first sigma is 4096: a last bit of float32, which differs between processors, is seen then.
        tolerance = 1e-4 if cell.option == "zero snr" else 1e-5
        assert relative(references.run(cell), STORED[str(cell)]) < tolerance, str(cell)
