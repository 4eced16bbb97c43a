"""The schedulers by name, in two families: what diffusers' classes do, and what AUTOMATIC1111's web UI does.

Eight names are in both lists and mean different things there. A row is a sampler, a grid, and their options; a new
scheduler is one function and one row. Rows are in `scheduler_rows.py`.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..errors import UsageError, unknown
from . import names
from .noise_model import NoiseModel
from .samplers import Sampler
from .schedules import Grid, Schedule
from .spacings import SPACINGS, spacing_name

Options = Mapping[str, Any]
FAMILIES = ("diffusers", "a1111")
SCHEDULES = tuple(SPACINGS)


Intervals = Callable[[Schedule], list[tuple[float, float]]]


@dataclass(frozen=True)
class Scheduler:
    """A named scheduler.

    order: of convergence as measured on Gaussian data with many steps and eta 0 (`tests/test_samplers.py`): there LMS and
    PLMS, of fourth order, and DPM++ 3M SDE, of third, have only their first steps' error left, of second. For DDPM, LCM
    and Restart, which always add noise, their formula's; None where the sampler chooses its own steps. calls: of the
    model, a step; None where they vary. least_steps: the fewest it can take. any_schedule: whether it can walk the named
    ones. adaptive: how many steps it takes shows on the way. counts_timesteps: the web UI spaces its timesteps, not
    noise levels, and takes as many steps as come of that.

    random: draws noise whatever eta is. eta: how much of each step's noise is fresh, 0 to 1, which the sampler is
    given; None where that can't be chosen. brownian: where the noise is to be a Brownian path's, the intervals of it
    that will be asked for, in order.

    diffusers: the class whose numbers it gives. defaults: that class's own, where a `scheduler_config.json` is silent.
    forced: what the name itself says, whatever the file says. fixed: options that are implemented for these values
    only; any other value is refused, never ignored.
    """

    name: str
    family: str
    sampler: Sampler
    grid: Grid
    order: int | None
    calls: float | None = 1
    least_steps: int = 1
    any_schedule: bool = True
    adaptive: bool = False
    counts_timesteps: bool = False
    random: bool = False
    eta: float | None = None
    brownian: Intervals | None = None
    diffusers: str | None = None
    defaults: Options = field(default_factory=dict)
    forced: Options = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.eta is not None:
            sampler: Any = self.sampler  # whose type does not tell of its options
            object.__setattr__(self, "sampler", partial(sampler, eta=self.eta))

    @property
    def webui(self) -> bool:
        """Whether it does as AUTOMATIC1111 does; a few are in its family but do as diffusers' classes."""
        return self.family == "a1111" and self.diffusers is None

    @property
    def stochastic(self) -> bool:
        return self.random or bool(self.eta)

    def with_eta(self, eta: float) -> Scheduler:
        if self.eta is None:
            raise UsageError(f"{self.name} has no eta")
        if isinstance(eta, bool) or not isinstance(eta, numbers.Real) or not 0 <= eta <= 1:
            raise UsageError(f"eta must be a number from 0 to 1, got {eta!r}")
        return replace(self, eta=float(eta))

    def noise_model(self, config: Options) -> NoiseModel:
        """The model's `scheduler_config.json` read as this scheduler reads it; UsageError for what it can't do."""
        _check_noise(config)
        written = {k: v for k, v in config.items() if not k.startswith("_")}
        merged = {**_DEFAULTS, **self.defaults, **written, **self.forced}
        for key, allowed in {**_FIXED, **self.fixed}.items():
            if merged.get(key, allowed[0]) not in allowed:
                values = ", ".join(map(repr, allowed))
                raise UsageError(
                    f"{self.name}: {key} {merged[key]!r} in scheduler_config.json is not supported; allowed: {values}"
                )
        return NoiseModel(merged, self.webui)

    def schedule(self, model: NoiseModel, steps: int, named: str | None = None) -> Schedule:
        """Its own schedule, or one of `SCHEDULES`."""
        if not self.least_steps <= steps <= model.train_steps:
            raise UsageError(f"{self.name} takes {self.least_steps} to {model.train_steps} steps, got {steps}")
        if named is None:
            return self.grid(model, steps, None)
        if not self.any_schedule:
            raise UsageError(f"{self.name} makes its own schedule and can't use {named!r}")
        return self.grid(model, steps, spacing_name(named))


_DEFAULTS: Options = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
}  # fmt: skip
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min", None),
    "use_flow_sigmas": (False, None),
}
_OTHER_NOISE = ("FlowM", "EDM", "CosineDPM", "CMStochastic")  # diffusers' classes without betas


def all_schedulers() -> list[Scheduler]:
    """Of both families; the few-step ones are in both."""
    from .scheduler_rows import ROWS

    return list(ROWS)


def get_scheduler(name: str, family: str = "diffusers") -> Scheduler:
    """By name, however it is spelled, first in `family`, then in the other; UsageError lists what there is.

    The name of one of diffusers' classes is another spelling of the first row that has its numbers.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    rows = sorted(all_schedulers(), key=lambda row: row.family != family)
    wanted = names.key(name)
    for row in rows:
        if names.key(row.name) == wanted:
            return row
    for row in all_schedulers():
        if row.diffusers and names.key(row.diffusers) == wanted:
            return get_scheduler(row.name, family)
    if (parts := _with_schedule(name, rows)) is not None:
        raise UsageError(f"unknown scheduler {name!r}; say scheduler {parts[0]!r} and schedule {parts[1]!r}")
    raise unknown("scheduler", name, dict.fromkeys(row.name for row in rows))


def _with_schedule(name: str, rows: list[Scheduler]) -> tuple[str, str] | None:
    """'Euler Karras' -> ('Euler', 'karras'): the web UI's old lists had such names, and no row is needed for them."""
    known = {names.key(row.name): row.name for row in reversed(rows) if row.any_schedule}
    words = name.replace("_", " ").split()
    for i in range(1, len(words)):
        with contextlib.suppress(UsageError):
            schedule = spacing_name(" ".join(words[i:]))
            if scheduler := known.get(names.key(" ".join(words[:i]))):
                return scheduler, schedule
    return None


def scheduler_named_in(config: Options, cure: str | None = None) -> str:
    """The name of the scheduler that a `scheduler_config.json` was written for, in the diffusers family.

    UsageError for a class that is not implemented, with the cure, if there is a better one than to name another.
    """
    _check_noise(config)
    written = config.get("_class_name")
    rows = [row for row in all_schedulers() if row.diffusers and row.family == "diffusers"]
    for row in rows:
        if row.diffusers == written:
            return row.name
    known = sorted({str(row.diffusers) for row in rows})
    cure = cure or f"name one with --scheduler ({', '.join(row.name for row in rows)})"
    raise UsageError(
        f"scheduler_config.json names {written!r}, which is not implemented; {cure}. Implemented: {', '.join(known)}"
    )


def _check_noise(config: Options) -> None:
    """UsageError for the configuration of a model that was trained on noise levels of another kind."""
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind.startswith(_OTHER_NOISE):
        raise UsageError(
            f"scheduler_config.json is a {kind}'s, of a model trained on another kind of noise levels; drawn are models "
            "whose noise levels are made of betas, as EulerDiscreteScheduler's are"
        )
