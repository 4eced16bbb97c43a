"""What the benchmarks conclude from their rows; the figures themselves are theirs."""

from __future__ import annotations

from dataclasses import replace

from vega_edge.bench import meaning, samplers, schedulers

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


def test_samplers_are_held_against_diffusers_and_a_millisecond() -> None:
    good = {"family": "diffusers", "name": "Euler", "stochastic": False, "ms": 0.99, "diffusers_ms": 2.0, "ratio": 0.5}
    drawing = {**good, "name": "Euler a", "stochastic": True, "ms": 5.0, "ratio": 1.3}
    alone = {**good, "name": "Restart", "stochastic": True, "ms": 9.0, "diffusers_ms": None, "ratio": None}
    assert samplers.shortfalls([good, drawing, alone]) == []
    assert samplers.shortfalls([{**good, "ms": 1.0, "ratio": 0.51}, {**drawing, "ratio": 1.31}]) == [
        "Euler (diffusers): 0.51 of diffusers' time, goal 0.5", "Euler (diffusers): 1.00 ms a step, goal below 1",
        "Euler a (diffusers): 1.31 of diffusers' time, goal 1.3",
    ]  # fmt: skip
