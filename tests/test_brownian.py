"""The Brownian tree: torchsde's numbers as k-diffusion asks for them, and what makes it a Brownian path."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

from vega_edge.runtime.brownian import BrownianTree
from vega_edge.runtime.prefetch import Prefetch
from vega_edge.runtime.rng import NoiseSource
from vega_edge.runtime.rng_nv import PhiloxGenerator
from vega_edge.runtime.samplers import Noise

from .seed_references import TREE_SEEDS, TREE_SHAPE, TorchTree, queries, sigmas, stored

LOW, HIGH = sigmas()[-1], sigmas()[0]


def tree(seeds: tuple[int, ...] = TREE_SEEDS, rng: str = "torch", shape: tuple[int, ...] = TREE_SHAPE) -> Noise:
    return NoiseSource(seeds, rng).brownian(shape, LOW, HIGH)


def test_stored_values_of_torchsde() -> None:
    ours = tree()
    for (a, b), theirs in zip(queries(), stored("tree"), strict=True):
        assert np.abs(ours(a, b) - theirs).max() < 1e-5, (a, b)


@pytest.mark.parametrize("shape", [(1,), (4, 16, 16)])
@pytest.mark.parametrize("steps", [1, 2, 25, 61])
def test_equal_to_torchsde(shape: tuple[int, ...], steps: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("torchsde")
    grid = sigmas(steps + 1)
    theirs, ours = (
        TorchTree((7, 2**31), grid[-1], grid[0], shape),
        NoiseSource((7, 2**31)).brownian(shape, grid[-1], grid[0]),
    )
    for a, b in pairwise(grid):
        middle = float(np.sqrt(a * b))  # as DPM++ SDE asks, in the same step
        for pair in ((a, middle), (a, b)):
            assert np.abs(ours(*pair) - theirs(*pair)).max() < 1e-5, pair


def test_nodes_are_drawn_by_the_chosen_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOMATIC1111 puts its own generator in the place of torchsde's `_randn`; here torchsde is given ours."""
    torch = pytest.importorskip("torch")
    interval = pytest.importorskip("torchsde._brownian.brownian_interval")

    def nodes(size: tuple[int, ...], dtype: object, device: object, seed: int) -> object:
        return torch.from_numpy(PhiloxGenerator(int(seed)).randn(tuple(size)))

    monkeypatch.setattr(interval, "_randn", nodes)
    theirs, ours = TorchTree(TREE_SEEDS, LOW, HIGH), tree(rng="nv")
    for a, b in queries():
        assert np.abs(ours(a, b) - theirs(a, b)).max() < 1e-5


def test_nv_nodes_differ_from_torch_nodes() -> None:
    assert np.abs(tree(rng="nv")(HIGH, 1.0) - tree()(HIGH, 1.0)).max() > 0.1


def test_one_tree_a_sample_whatever_the_batch() -> None:
    both, alone = tree(), [tree((s,)) for s in TREE_SEEDS]
    for a, b in queries():
        assert np.array_equal(both(a, b), np.concatenate([t(a, b) for t in alone]))


def test_order_and_repetition_change_nothing() -> None:
    asked = [tree()(a, b) for a, b in queries()]
    same = tree()
    for _ in range(2):
        for (a, b), first in reversed(list(zip(queries(), asked, strict=True))):
            assert np.array_equal(same(a, b), first)


def test_increments_add_up_to_the_whole_and_turn_with_their_direction() -> None:
    noise = tree()
    parts = sum(noise(a, b) * np.sqrt(a - b) for a, b in pairwise(sigmas()))
    assert np.abs(parts - noise(HIGH, LOW) * np.sqrt(HIGH - LOW)).max() < 1e-4
    assert np.array_equal(noise(3.0, 1.0), -noise(1.0, 3.0))


def test_deviates_are_of_unit_variance_and_independent_from_step_to_step() -> None:
    noise = tree((1,), shape=(4, 32, 32))
    drawn = np.stack([noise(a, b).ravel() for a, b in pairwise(sigmas(9))])
    assert np.abs(drawn.std(1) - 1).max() < 0.05
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.06


def test_outside_the_range_the_path_stands_still() -> None:
    noise = tree()
    assert np.allclose(noise(1.0, 0.0), noise(1.0, LOW) * np.float32(np.sqrt(1.0 - LOW)), atol=1e-6)


def test_what_is_kept_is_bounded() -> None:
    path = BrownianTree(3, LOW, HIGH, lambda seed: np.random.RandomState(seed).standard_normal(2).astype(np.float32))
    for a, b in pairwise(sigmas(300)):
        path(b, a)
    assert len(path._left) <= 64


# -- drawing ahead ----------------------------------------------------------------------------------------------------


def test_drawing_ahead_changes_no_number() -> None:
    pairs = queries()
    plain, source = tree(), NoiseSource((3, 4))
    with Prefetch(tree(), pairs[::2]) as ahead:  # every other query was not foreseen
        for a, b in pairs:
            assert np.array_equal(ahead(a, b), plain(a, b))
    with Prefetch(lambda a, b: source((5,))) as ahead:
        drawn = [ahead(1.0, 0.5) for _ in range(4)]
    again = NoiseSource((3, 4))
    assert all(np.array_equal(d, again((5,))) for d in drawn)


def test_the_next_draw_runs_while_the_caller_does_something_else() -> None:
    made, drawn = [], threading.Event()

    def noise(a: float, b: float) -> np.ndarray:
        made.append(threading.current_thread())
        drawn.set()
        return np.full(1, len(made), np.float32)

    with Prefetch(noise) as ahead:
        assert drawn.wait(10)  # before anything was asked
        drawn.clear()
        assert ahead(2.0, 1.0)[0] == 1
        assert drawn.wait(10) and len(made) == 2
    assert threading.main_thread() not in made
    assert not any(t.is_alive() for t in made)


def test_an_error_of_a_draw_reaches_the_caller() -> None:
    def broken(a: float, b: float) -> np.ndarray:
        raise MemoryError("no room")

    with Prefetch(broken) as ahead, pytest.raises(MemoryError, match="no room"):
        ahead(2.0, 1.0)
