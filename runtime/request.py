"""What is asked of a pipeline, checked against what the model allows before anything runs."""

from __future__ import annotations

import numbers
import operator
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..errors import UsageError, unknown
from .init_image import as_rgb, size_for
from .prompts import SYNTAXES
from .rng import GENERATORS, MAX_SEED, NOISE_DTYPES
from .schedulers import FAMILIES, Scheduler, get_scheduler
from .spacings import spacing_name

MAX_SAMPLES = 4
STRENGTH = 0.6
_WORDS = ("family", "rng", "noise_dtype", "prompt_syntax")  # options that are one of a few words, in any case


@dataclass(frozen=True)
class Limits:
    """What a model allows: steps, guidance and size as (least, most), sizes in px and a multiple of `multiple_px`."""

    steps: tuple[int, int] = (1, 1000)
    guidance: tuple[float, float] = (0.0, 30.0)
    size_px: tuple[int, int] = (64, 2048)
    multiple_px: int = 64

    @classmethod
    def of(cls, written: Mapping[str, Any], multiple_px: int) -> Limits:
        ranges = {k: (written[k][0], written[k][1]) for k in ("steps", "guidance", "size_px") if k in written}
        return cls(**ranges, multiple_px=multiple_px)


@dataclass(frozen=True)
class Request:
    """One generation, checked: sample i of 1 to 4 has seed + i (0 to 999999999999999); width and height in px.

    guidance 1 and less means none. negative None is the model's own default, which may differ from an empty text.
    family: what the scheduler's name means. schedule: the noise levels, by name; None for the scheduler's own. eta: how
    much of the noise is drawn anew each step; None for the scheduler's own. rng, noise_dtype: see `NoiseSource`.
    guidance_rescale: how much of the contrast that guidance adds is taken back, 0 to 1.

    image: what to start from, RGB and upright, or None; strength: how much of the way from noise is walked from there,
    above 0 to 1. prompt_syntax: what the prompts' punctuation means, of `prompts.SYNTAXES`. long_prompt: all of them is
    read, 75 tokens at a time, not the first 75 alone.
    """

    prompt: str
    negative: str | None
    steps: int
    guidance: float
    scheduler: str
    seed: int
    samples: int
    width: int
    height: int
    family: str = "diffusers"
    schedule: str | None = None
    eta: float | None = None
    rng: str = "torch"
    noise_dtype: str = "fp32"
    guidance_rescale: float = 0.0
    image: Image.Image | None = None
    strength: float = STRENGTH
    long_prompt: bool = False
    prompt_syntax: str = "plain"

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.samples)]

    @property
    def sampling(self) -> Scheduler:
        """The scheduler by name and family, with the eta that was asked for."""
        scheduler = get_scheduler(self.scheduler, self.family)
        return scheduler if self.eta is None else scheduler.with_eta(self.eta)

    def parameters(self, model: str, version: str, sample: int = 0) -> str:
        """The text that AUTOMATIC1111's web UI writes into a picture and that other tools read; keys of its own making
        where it has them. What is as always is left out, but for the seed and the size.
        """
        facts = [f"Steps: {self.steps}", f"Sampler: {self.scheduler}"]
        if self.schedule:
            facts.append(f"Schedule type: {_TITLES.get(self.schedule, self.schedule.replace('_', ' ').title())}")
        facts += [f"CFG scale: {self.guidance:g}", f"Seed: {self.seeds[sample]}", f"Size: {self.width}x{self.height}"]
        facts.append(f"Model: {model}")
        if self.image is not None:
            facts.append(f"Denoising strength: {self.strength:g}")
        if self.eta is not None:
            facts.append(f"{'Eta DDIM' if self.scheduler == 'DDIM' else 'Eta'}: {self.eta:g}")
        if self.guidance_rescale:
            facts.append(f"CFG Rescale: {self.guidance_rescale:g}")
        if self.rng != "torch":
            facts.append(f"RNG: {self.rng.upper()}")
        if self.noise_dtype != "fp32":
            facts.append(f"Noise dtype: {self.noise_dtype}")
        if self.family != "diffusers":
            facts.append(f"Family: {self.family}")
        if self.prompt_syntax != "plain":
            facts.append(f"Prompt syntax: {self.prompt_syntax}")
        if self.long_prompt:
            facts.append("Long prompt: True")
        negative = [f"Negative prompt: {self.negative}"] if self.negative is not None else []
        return "\n".join([self.prompt, *negative, ", ".join([*facts, f"Version: vega-edge {version}"])])


_TITLES = {
    "sgm_uniform": "SGM Uniform",
    "ays": "Align Your Steps",
    "ays_sd15": "Align Your Steps",
    "ays_sdxl": "Align Your Steps",
}  # as the web UI says


def alike(a: Request, b: Request) -> bool:
    """Whether two requests can be drawn as one batch: all but what each sample has of its own is the same."""
    return replace(a, prompt="", negative=None, seed=0, samples=1) == replace(
        b, prompt="", negative=None, seed=0, samples=1
    )


def make_request(options: Mapping[str, Any], defaults: Mapping[str, Any], limits: Limits) -> Request:
    """The caller's options over the model's defaults; UsageError for what is out of range, of a wrong type or unknown."""
    known = set(Request.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}; there are: {', '.join(sorted(known))}")
    if not _same_scheduler(options, defaults):  # a model's schedule is meant for its own scheduler
        defaults = {k: v for k, v in defaults.items() if k != "schedule"}
    value = {**defaults, **{k: v for k, v in options.items() if v is not None}}
    prompt, negative = _text("prompt", value.get("prompt")), value.get("negative")
    for name in ("scheduler", "schedule", *_WORDS):
        if value.get(name) is not None:
            text = _text(name, value[name])
            value[name] = text.lower() if name in _WORDS else text
    samples = _whole("samples", value.get("samples", 1), 1, MAX_SAMPLES)
    seed_of = "seed" if samples == 1 else f"seed, the first of {samples},"
    seed = _whole(seed_of, value.get("seed", -1), -1, MAX_SEED - samples + 1)
    scheduler = _scheduler(value, options.get("family") is not None)
    eta = value.get("eta")
    if eta is not None:
        scheduler.with_eta(eta)  # knows its range, and whether there is one
    image = _picture(options)
    if image is not None and not (options.get("width") or options.get("height")):
        default = value["width"], value["height"]
        value["width"], value["height"] = size_for(image, default, *limits.size_px, limits.multiple_px)
    return Request(
        prompt=prompt,
        negative=None if negative is None else _text("negative", negative),
        steps=_steps(value["steps"], scheduler, limits),
        guidance=_number("guidance", value["guidance"], *limits.guidance),
        scheduler=scheduler.name,
        seed=secrets.randbelow(2**32) if seed == -1 else seed,
        samples=samples,
        width=_side("width", value["width"], limits),
        height=_side("height", value["height"], limits),
        family=scheduler.family,
        schedule=None if value.get("schedule") is None else spacing_name(value["schedule"]),
        eta=None if eta is None else float(eta),
        rng=_one_of("rng", value.get("rng", "torch"), GENERATORS),
        noise_dtype=_one_of("noise dtype", value.get("noise_dtype", "fp32"), NOISE_DTYPES),
        guidance_rescale=_number("guidance rescale", value.get("guidance_rescale", 0.0), 0.0, 1.0),
        image=image,
        strength=_number("strength", value.get("strength", STRENGTH), 0.0, 1.0),
        long_prompt=_flag("long_prompt", value.get("long_prompt", False)),
        prompt_syntax=_one_of("prompt syntax", value.get("prompt_syntax", "plain"), SYNTAXES),
    )


def _same_scheduler(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether what was asked for comes to the model's own scheduler, however it is spelled."""
    if options.get("scheduler") is None or "scheduler" not in defaults:
        return options.get("scheduler") is None
    family = defaults.get("family", FAMILIES[0])
    asked = get_scheduler(_text("scheduler", options["scheduler"]), options.get("family") or family)
    return asked == get_scheduler(defaults["scheduler"], family)


def _picture(options: Mapping[str, Any]) -> Image.Image | None:
    image = options.get("image")
    if image is None:
        if options.get("strength") is not None:
            raise UsageError("strength says how far to go from a picture; give one with image")
        return None
    if not isinstance(image, Image.Image):
        raise UsageError(f"image must be a PIL picture, got {type(image).__name__}")
    try:
        return as_rgb(image)
    except (AssertionError, OSError, SyntaxError, ValueError) as failure:  # how Pillow fails on closed and damaged ones
        raise UsageError(
            f"image can't be read ({str(failure) or 'it was closed'}); give one that is open and complete"
        ) from failure


def _flag(name: str, got: Any) -> bool:
    if not isinstance(got, bool):
        raise UsageError(f"{name} must be True or False, got {got!r}")
    return got


def _text(name: str, got: Any) -> str:
    if not isinstance(got, str):
        raise UsageError(f"{name} must be text, got {type(got).__name__}")
    return re.sub("[\ud800-\udfff]", "\ufffd", got)  # half a surrogate pair, which no encoder and no file takes


def _scheduler(value: Mapping[str, Any], asked: bool) -> Scheduler:
    """By name in the model's family, or the only one that has it; a family that was asked for is kept to."""
    family = value.get("family", FAMILIES[0])
    scheduler = get_scheduler(value["scheduler"], family)
    if asked and scheduler.family != family:
        raise UsageError(f"{scheduler.name} is not in the family {family}; it is in {scheduler.family}")
    return scheduler


def _one_of(name: str, got: str, allowed: Iterable[str]) -> str:
    if got not in allowed:
        raise unknown(name, got, allowed)
    return got


def _number(name: str, got: Any, low: float, high: float) -> float:
    if isinstance(got, bool) or not isinstance(got, numbers.Real) or not low <= float(got) <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {got!r}")
    return float(got)


def _whole(name: str, got: Any, low: int, high: int) -> int:
    try:
        whole = operator.index(got)  # numpy's whole numbers too
    except TypeError:
        whole = low - 1
    if isinstance(got, bool) or not low <= whole <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {got!r}")
    return whole


def _steps(got: Any, scheduler: Scheduler, limits: Limits) -> int:
    """In the model's range, and enough for the scheduler."""
    steps = _whole("steps", got, *limits.steps)
    if steps < scheduler.least_steps:
        raise UsageError(f"{scheduler.name} takes {scheduler.least_steps} to {limits.steps[1]} steps, got {steps}")
    return steps


def _side(name: str, got: Any, limits: Limits) -> int:
    px = _whole(name, got, *limits.size_px)
    if px % limits.multiple_px:
        below = px // limits.multiple_px * limits.multiple_px
        near = [s for s in (below, below + limits.multiple_px) if limits.size_px[0] <= s <= limits.size_px[1]]
        raise UsageError(
            f"{name} must be a multiple of {limits.multiple_px} px, got {px}; nearest: {' or '.join(map(str, near))}"
        )
    return px
