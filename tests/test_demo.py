"""The embedded model's pictures and its checker: what all of its figures rest on."""

from __future__ import annotations

import json
import re
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the checker needs scipy (the test extra)")

from vega_edge.demo import check, scenes
from vega_edge.demo.render import render
from vega_edge.demo.scenes import COLORS, SHAPES, Scene, Thing

ROOT = Path(scenes.__file__).parent.parent


def contents(*folders: str) -> list[bytes]:
    root = Path(scenes.__file__).parent
    return [file.read_bytes() for folder in folders for file in (root / folder).rglob("*") if file.is_file()]


def test_sizes() -> None:
    """What the wheel carries; and what a clone fetches, which git compresses and fetches once where it is the same."""
    assert 1e6 < sum(map(len, contents("bundles/demo-vegart"))) <= 12e6
    assert 1e6 < sum(len(zlib.compress(content)) for content in set(contents("weights", "bundles"))) <= 28e6


def test_what_git_keeps() -> None:
    """Every attempt that was ever committed counts."""

    def git(*command: str, given: str = "") -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, input=given, capture_output=True, text=True, check=True
        ).stdout

    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("not a whole clone")

    def size(*paths: str) -> int:
        names = "\n".join(line.split()[0] for line in git("rev-list", "--objects", "--all", "--", *paths).splitlines())
        return sum(map(int, git("cat-file", "--batch-check=%(objectsize:disk)", given=names).split()))

    assert size("demo/weights", "demo/bundles") <= 28e6
    assert size() <= 32e6


CONFIGS = {"demo-vega": "segmind-vega", "demo-small-sd": "small-sd", "demo-tiny-sd": "tiny-sd"}
# What may differ from the real model: how wide it is, and how large the pictures.
WIDTHS = {
    "block_out_channels", "cross_attention_dim", "attention_head_dim", "projection_class_embeddings_input_dim",
    "addition_time_embed_dim", "norm_num_groups", "sample_size",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_real_models_network_only_narrower(name: str) -> None:
    real = json.loads((ROOT / "models" / "configs" / f"unet-{CONFIGS[name]}.json").read_text())
    ours = json.loads((ROOT / "demo" / "weights" / name / "unet" / "config.json").read_text())
    differ = {k for k in real if not k.startswith("_") and (real[k] or None) != (ours.get(k) or None)}
    assert differ <= WIDTHS, differ - WIDTHS
    assert len(real["block_out_channels"]) == len(ours["block_out_channels"])


def drawn(n: int, two: float, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, two=two) for _ in range(n)]


@pytest.mark.parametrize("two", [0.0, 1.0])
def test_the_checker_reads_clean_pictures(two: float) -> None:
    right = [check.score(render(s), s).all for s in drawn(200, two)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Thing("blue", "star", "big", 64, 64, 36, 0), "color"),
        (Thing("red", "heart", "big", 64, 64, 36, 0), "shape"),
    ],
)
def test_the_checker_tells_a_wrong_picture(wrong: Thing, field: str) -> None:
    asked = Scene((Thing("red", "star", "big", 64, 64, 36, 0),), "gray", 1)
    score = check.score(render(Scene((wrong,), "gray", 1)), asked)
    assert not score.all and not getattr(score, field)
    assert score.background
    assert not check.score(render(Scene((*asked.things,), "pink", 1)), asked).background
    nothing = check.score(render(Scene((), "gray", 1)), asked)
    assert (nothing.color, nothing.shape, nothing.background) == (False, False, True)


def test_the_checker_tells_a_relation() -> None:
    moon, house = Thing("yellow", "moon", "", 64, 35, 20, 0), Thing("green", "house", "", 64, 92, 20, 0)
    picture = render(Scene((moon, house), "gray", 1))
    assert check.score(picture, Scene((moon, house), "gray", 1, relation="above")).all
    assert not check.score(picture, Scene((moon, house), "gray", 1, relation="below")).all  # the house is there
    assert not check.score(picture, Scene((moon, house), "gray", 1, relation="left of")).relation


def test_what_is_unseen_is_never_drawn_nor_named() -> None:
    rng = np.random.default_rng(3)
    for scene in drawn(3000, 0.35, seed=1):
        text = scenes.caption(scene, rng)
        for thing in scene.things:
            assert not scenes.unseen(thing.color, thing.shape, scene.background)
        for color, shape in scenes.UNSEEN_PAIRS:
            assert not re.search(rf"\b{color} {shape}\b", text)


def test_there_is_enough_to_draw() -> None:
    seen, held_out = scenes.combinations(False), scenes.combinations(True)
    assert len(COLORS) >= 8 and len(SHAPES) >= 8 and len(scenes.BACKGROUNDS) >= 8
    assert not set(seen) & set(held_out)
    triples = [c for c in held_out if c[:2] not in scenes.UNSEEN_PAIRS]
    rest = len(seen) + len(triples)
    assert 0.07 < len(triples) / rest < 0.13  # a tenth of the triples
    assert {c for c, _, _ in seen} == set(COLORS) and {s for _, s, _ in seen} == set(SHAPES)


def test_pictures_repeat_and_differ() -> None:
    scene = drawn(1, 0.0)[0]
    assert np.array_equal(render(scene), render(scene))
    assert render(scene).shape == (128, 128, 3) and render(scene).dtype == np.uint8
    assert not np.array_equal(render(drawn(1, 0.0, seed=9)[0]), render(scene))


def test_captions_are_sometimes_short_and_sometimes_empty() -> None:
    rng = np.random.default_rng(2)
    texts = [scenes.caption(s, rng) for s in drawn(2000, 0.35)]
    assert "" in texts
    assert sum(len(t.split()) <= 2 for t in texts) > 100
    words = set(scenes.vocabulary())
    assert all(set(t.replace(",", " , ").split()) <= words for t in texts)
