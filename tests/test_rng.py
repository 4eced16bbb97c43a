"""torch's CPU generator in numpy: against stored values of torch's, and against torch itself where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from vega_edge.runtime.rng import NoiseSource, TorchGenerator

SEEDS = (0, 7, 2**32 + 5, 999_999_999_999_999)


def test_stored_values_of_torch() -> None:
    assert TorchGenerator(0).randn((3,)) == pytest.approx([1.5409961, -0.2934289, -2.1787894], abs=1e-6)
    assert TorchGenerator(42).randn((4, 4))[0] == pytest.approx([1.9269153, 1.4872841, 0.9007172, -2.1055214], abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_to_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    for shape in ((1, 4, 16, 16), (5,), (3,), (20,), (100,), (4,), (1, 4, 128, 128), (15,), (16,), (17,), (1,)):
        expected = torch.randn(shape, generator=theirs).numpy()
        assert np.abs(ours.randn(shape) - expected).max() <= 6e-7, shape


def test_each_sample_is_what_its_seed_draws_alone() -> None:
    together = NoiseSource([5, 6, 7])
    alone = [NoiseSource([s]) for s in (5, 6, 7)]
    for _ in range(3):
        assert np.array_equal(together((4, 16, 16)), np.concatenate([a((4, 16, 16)) for a in alone]))
