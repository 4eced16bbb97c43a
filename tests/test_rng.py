"""Noise by seed: torch's CPU generator against torch's own numbers, the NV source against its published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vega_edge.errors import UsageError
from vega_edge.runtime.rng import NoiseSource, TorchGenerator
from vega_edge.runtime.rng_nv import PhiloxGenerator, philox

from .seed_references import SEEDS, SHAPES, stored, torch_draws

HALF = 2.0**-10  # of a value below 2, half's last place; two machines may round a tie differently


def difference(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> float:
    return float(
        (np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1) if dtype == "fp16" else np.abs(ours - theirs)).max()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 6e-7), ("fp16", HALF)])
@pytest.mark.parametrize("seed", SEEDS)
def test_stored_draws_of_torch(seed: int, dtype: str, tolerance: float) -> None:
    generator = TorchGenerator(seed, dtype == "fp16")
    ours = np.concatenate([generator.randn(s).ravel() for s in SHAPES])
    assert ours.dtype == np.float32
    assert difference(ours, stored(f"{dtype}-{seed}"), dtype) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 6e-7), ("fp16", HALF)])
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_to_torch(seed: int, dtype: str, tolerance: float) -> None:
    torch = pytest.importorskip("torch")
    if dtype == "fp16" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("this torch computes half draws in half")
    generator = TorchGenerator(seed, dtype == "fp16")
    for shape, theirs in zip(SHAPES, torch_draws(seed, dtype), strict=True):
        assert difference(generator.randn(shape), theirs, dtype) <= tolerance, shape
    kind = torch.float16 if dtype == "fp16" else torch.float32
    large = torch.randn((4, 128, 128), generator=torch.Generator().manual_seed(seed), dtype=kind).float().numpy()
    ours = TorchGenerator(seed, dtype == "fp16").randn((4, 128, 128))
    assert difference(ours, large, dtype) <= tolerance
    assert dtype == "fp32" or np.mean(ours == large) > 0.999


def test_half_draws_move_the_stream_differently() -> None:
    single, half = TorchGenerator(3), TorchGenerator(3, half=True)
    assert np.abs(single.randn((32,)) - half.randn((32,))).max() < 2e-3  # the same, rounded
    assert np.abs(single.randn((20,)) - half.randn((20,))).max() > 0.1  # a tail takes other words
    assert np.abs(single.randn((16,)) - half.randn((16,))).max() > 0.1


# Random123's kat_vectors (D. E. Shaw Research): philox4x32, 10 rounds, as counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    def words(text: str) -> list[int]:
        return [int(w, 16) for w in text.split()]

    low, high = words(key)
    got = philox(np.array(words(counter), np.uint64)[:, None], (low, high))
    assert got[:, 0].tolist() == words(result)


def test_published_draw_of_the_nv_source() -> None:
    """The example in the definition's own documentation, `modules/rng_philox.py` of stable-diffusion-webui."""
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    assert np.abs(PhiloxGenerator(0).randn((3, 4)) - published).max() < 5e-7


def nv_element(seed: int, draw: int, element: int) -> float:
    """The definition for one element, in whole numbers."""
    a, b, c, d = draw, 0, element, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k0, second & 0xFFFFFFFF, first >> 32 ^ d ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return math.sqrt(-2 * math.log((a + 0.5) / 2**32)) * math.sin((b + 0.5) / 2**32 * 2 * math.pi)


@pytest.mark.parametrize("seed", SEEDS)
def test_nv_draws_advance_by_one_and_read_the_whole_seed(seed: int) -> None:
    generator = PhiloxGenerator(seed)
    for draw, size in enumerate((5, 5000, 20)):  # the index advances by one whatever the size
        values = generator.randn((size,))
        for element in {0, 1, 4, size // 2, size - 1}:
            assert values[element] == pytest.approx(nv_element(seed, draw, element), abs=1e-6)
    rounded = PhiloxGenerator(seed, half=True).randn((5,))
    assert np.array_equal(rounded, PhiloxGenerator(seed).randn((5,)).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("rng", ["torch", "nv"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_sample_is_what_its_seed_draws_alone(rng: str, dtype: str) -> None:
    together = NoiseSource([5, 6, 7], rng, dtype)
    alone = [NoiseSource([s], rng, dtype) for s in (5, 6, 7)]
    for _ in range(3):
        drawn = together((4, 16, 16))
        assert drawn.shape == (3, 4, 16, 16) and drawn.dtype == np.float32
        assert np.array_equal(drawn, np.concatenate([a((4, 16, 16)) for a in alone]))


def test_the_source_is_what_it_says() -> None:
    assert np.array_equal(NoiseSource([9], "nv")((40,))[0], PhiloxGenerator(9).randn((40,)))
    assert np.array_equal(NoiseSource([9], "torch", "fp16")((40,))[0], TorchGenerator(9, half=True).randn((40,)))
    assert np.array_equal(NoiseSource([9])((40,))[0], TorchGenerator(9).randn((40,)))
    with pytest.raises(UsageError) as error:
        NoiseSource([1], "gpu")
    assert str(error.value) == "unknown rng 'gpu'; there are: nv, torch"
    with pytest.raises(UsageError) as error:
        NoiseSource([1], dtype="bf16")
    assert str(error.value) == "unknown noise dtype 'bf16'; did you mean 'fp16'? there are: fp16, fp32"
