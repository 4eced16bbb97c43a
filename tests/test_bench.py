"""What the benchmarks conclude from their rows; the figures themselves are theirs."""

from __future__ import annotations

from dataclasses import replace

from vega_edge.bench import meaning, schedulers

GOOD = meaning.Row("demo-vegart, LCM, 4 steps", "seen", 400, 97, 96, 98, 93.0, 90, 0.85, 20.0, 0.1)
CONTROL = meaning.Row(
    "control: demo-vega without the LoRA, LCM, 4 steps", "seen", 400, 90, 85, 97, 80.0, None, 0.75, 35.0, 0.1
)


def test_meaning_says_which_goal_is_missed() -> None:
    assert meaning.shortfalls([GOOD, CONTROL]) == []
    assert meaning.shortfalls([replace(GOOD, all=89.9), CONTROL]) == [
        "demo-vegart, LCM, 4 steps, seen: 89.9 %, goal 90"
    ]


def test_meaning_wants_the_control_clearly_worse_on_every_measure() -> None:
    told = ["4 steps without the LoRA are not clearly worse than with it"]
    for same in ({"all": 91.0}, {"fit": 0.86}, {"teacher_rms": 19.0}):
        assert meaning.shortfalls([GOOD, replace(CONTROL, **same)]) == told


def test_schedulers_are_held_against_the_euler_of_their_family() -> None:
    rows = [
        schedulers.Row("diffusers", "Euler", "demo-vega", 60, 96.0, 0.2),
        schedulers.Row("diffusers", "DDIM", "demo-vega", 60, 86.0, 0.2),
        schedulers.Row("a1111", "Euler", "demo-vega", 60, 90.0, 0.2),
        schedulers.Row("a1111", "Restart", "demo-vega", 60, 79.9, 0.2),
    ]
    assert schedulers.shortfalls(rows) == ["Restart (a1111): 79.9 %, Euler has 90.0"]
    assert schedulers.table(rows).splitlines()[2:] == [
        "| Euler | 96.0 % | 90.0 % |", "| DDIM | 86.0 % |  |", "| Restart |  | 79.9 % |",
    ]  # fmt: skip
