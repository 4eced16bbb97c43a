"""The embedded models' benchmark: which prompts, how a picture is held against them, and what its file keeps."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the checker needs scipy (the test extra)")

from vega_edge.bench import meaning, meaning_rows
from vega_edge.bench.meaning_prompts import KINDS, Asked, judge, prompts
from vega_edge.bench.meaning_rows import Row, Run, load, merged, save
from vega_edge.demo.render import render
from vega_edge.demo.scenes import Scene, Thing
from vega_edge.errors import BundleError

STAR = Thing("red", "star", "big", 64, 64, 36, 0)
MOON = Thing("yellow", "moon", "small", 24, 24, 15, 0)
SKY = render(Scene((STAR, MOON), "night", 1))
EMPTY = render(Scene((), "night", 1))


def test_prompts_repeat_and_are_of_every_kind() -> None:
    for kind in KINDS:
        asked = prompts(kind, 40)
        assert asked == prompts(kind, 40) and len(asked) == 40
        assert all((one.scene is None) == (kind == "short") for one in asked)
    assert len({one.text for one in prompts("seen", 400)}) > 300


def test_short_prompts_name_less() -> None:
    asked = {one.text: one for one in prompts("short", 400)}
    assert asked["a star"] == Asked("a star", shape="star")
    assert asked["red heart"] == Asked("red heart", color="red", shape="heart")
    assert asked["night sky"] == Asked("night sky", background="night", thing=False)
    assert asked["sunset"].background == "sunset" and asked["pink background"].background == "pink"
    assert asked[""] == Asked("")
    assert sum(one.text == "" for one in prompts("short", 400)) == 40


@pytest.mark.parametrize(
    ("asked", "picture", "right"),
    [
        (Asked("a star", shape="star"), SKY, True),
        (Asked("a moon", shape="moon"), SKY, False),  # the largest thing counts
        (Asked("a star", shape="star"), EMPTY, False),
        (Asked("red star", color="red", shape="star"), SKY, True),
        (Asked("blue star", color="blue", shape="star"), SKY, False),
        (Asked("night sky", background="night", thing=False), EMPTY, True),
        (Asked("night sky", background="night", thing=False), SKY, True),
        (Asked("sunset", background="sunset", thing=False), SKY, False),
        (Asked(""), SKY, True),
        (Asked(""), EMPTY, False),
    ],
)
def test_short_prompts_are_judged_by_what_they_name(asked: Asked, picture: Any, right: bool) -> None:
    judged = judge(picture, asked)
    assert judged.all is right
    for name in ("color", "shape", "background"):
        assert (getattr(judged, name) is None) == (getattr(asked, name) is None)
    assert (judged.fit is None) == (asked.shape is None)


def test_whole_prompts_are_judged_by_all_of_their_scene() -> None:
    scene = Scene((STAR,), "night", 1)
    assert judge(render(scene), Asked("", scene)).all and judge(render(scene), Asked("", scene)).fit > 0.8
    assert not judge(SKY, Asked("", scene)).all  # a moon too many


def row(title: str, kind: str = "seen", right: float = 96.0, goal: float | None = 90) -> Row:
    return Row(title, kind, 400, 97, 96, 98, right, goal, 0.85, 20.0, 0.1)


def test_files_of_the_old_form_are_one_run(tmp_path: Path) -> None:
    file = tmp_path / "meaning.json"
    assert load(file) == []
    file.write_text(json.dumps({"commit": "old", "engine": "openvino", "rows": [asdict(row("a"))]}))
    runs = load(file)
    assert runs == [Run({"commit": "old", "engine": "openvino"}, [row("a")])]
    save(file, runs)
    assert load(file) == runs and list(json.loads(file.read_text())) == ["runs"]


def test_rows_keep_the_commit_that_they_were_measured_at() -> None:
    old = [Run({"commit": "1"}, [row("a"), row("b"), row("b", "two")]), Run({"commit": "2"}, [row("c")])]
    again = [row("b", right=91.0), row("c")]
    runs = merged(old, Run({"commit": "3"}, again))
    assert runs == [Run({"commit": "1"}, [row("a"), row("b", "two")]), Run({"commit": "3"}, again)]
    order = [("c", "seen"), ("b", "seen"), ("b", "two")]
    assert [r.key for r in meaning_rows.in_order(runs, order)] == [*order, ("a", "seen")]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """main() with rows that are made up: every one reaches 91 %. The settings that were asked for."""
    asked = []

    def evaluate(setting: meaning.Setting, *_: Any) -> Row:
        asked.append((setting.title, setting.prompts))
        return row(setting.title, setting.prompts, 91.0, setting.goal)

    monkeypatch.setattr(meaning, "evaluate", evaluate)
    monkeypatch.setattr(meaning, "check_bundles", lambda models: None)
    monkeypatch.setattr(meaning, "ceiling", lambda count: (100.0, 99.0))
    monkeypatch.setattr(meaning, "facts", lambda: {"commit": "now"})
    return asked


def test_only_some_rows_are_measured_and_all_are_judged(
    drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "meaning.json"
    kept = row("demo-vega, Euler, 25 steps, guidance 5", "seen", 94.9, 95)
    tiny = row("demo-tiny-sd, DPM Multi, 25 steps, guidance 5", "seen", 10.0, 85)
    save(file, [Run({"commit": "old"}, [kept, tiny])])
    monkeypatch.setattr(sys, "argv", ["meaning", "--only", "demo-tiny-sd", "-o", str(file), "--engine", "openvino"])
    with pytest.raises(SystemExit) as stopped:
        meaning.main()
    assert stopped.value.code == "demo-vega, Euler, 25 steps, guidance 5, seen: 94.9 %, goal 95"
    old, new = load(file)
    assert old == Run({"commit": "old"}, [kept]) and new.facts["commit"] == "now" and new.facts["engine"] == "openvino"
    assert [r.key for r in new.rows] == drawn == [(tiny.title, "seen"), (tiny.title, "unseen")]
    assert "94.9 %" in capsys.readouterr().out  # the table is of all rows too


def test_a_bundle_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    (tmp_path / "bundles" / "demo-vega").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["meaning"])
    with pytest.raises(SystemExit) as stopped:
        meaning.main()
    assert stopped.value.code == (
        "vega-edge: demo-small-sd, demo-tiny-sd: no bundle yet; "
        "run: vega-edge export demo-small-sd && vega-edge export demo-tiny-sd"
    )
    with pytest.raises(BundleError):
        meaning.check_bundles(["demo-small-sd"])


def test_a_row_is_the_mean_over_what_the_prompts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Asked("a star", shape="star"),
        Asked("a moon", shape="moon"),
        Asked("night", background="night"),
        Asked(""),
    ]
    monkeypatch.setattr(meaning, "prompts", lambda kind, count: asked)
    pipe = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(meaning.Pipeline, "open", lambda *_: pipe)
    pictures = {"Euler": [SKY] * 4, "LCM": [SKY, SKY, SKY, EMPTY]}
    monkeypatch.setattr(meaning, "draw", lambda pipe, asked, options: pictures[options["scheduler"]])
    setting = meaning.Setting("t", "demo-vegart", "short", meaning.few(4))
    got = meaning.evaluate(setting, 4, "any", meaning.Teacher("any"))  # the teacher's pictures are drawn where missing
    assert (got.shape, got.background, got.all, got.color) == (50.0, 100.0, 50.0, 0.0)
    alone = np.sqrt(np.mean((SKY.astype(float) - EMPTY) ** 2)) / 4
    assert got.teacher_rms == pytest.approx(alone, abs=0.01) and 0.3 < got.fit < 0.5
    assert meaning.evaluate(setting, 4, "any", None).teacher_rms is None
    assert replace(got, goal=100).key == ("t", "short")
