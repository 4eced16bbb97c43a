"""Spacings by name: n falling noise levels over a model's range, for any sampler. Zero, the last level, is not theirs.

What k-diffusion's `sampling.py` and AUTOMATIC1111's `modules/sd_schedulers.py` compute, by their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import unknown
from .noise_model import Array, NoiseModel

Spacing = Callable[[NoiseModel, int, float, float], Array]


def karras(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Equation 5 of Karras et al. 2022 (arXiv:2206.00364), rho 7."""
    top, bottom = high ** (1 / 7), low ** (1 / 7)
    inner = model.rounded(model.even(0, 1, n) * model.rounded(np.asarray(bottom - top)))
    return model.rounded(model.rounded(model.rounded(np.asarray(top)) + inner) ** 7)


def exponential(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Even in log sigma."""
    return model.rounded(np.exp(model.even(math.log(high), math.log(low), n)))


def normal(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Even in timesteps, both ends of the range included; also what k-diffusion samples on when nothing is said."""
    return model.log_sigma_at(model.even(*_ends(model, low, high), n))


def sgm_uniform(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Even in timesteps, the low end left out (Stability's generative-models)."""
    return model.log_sigma_at(model.even(*_ends(model, low, high), n + 1)[:-1])


def _ends(model: NoiseModel, low: float, high: float) -> tuple[float, float]:
    low_t, high_t = model.log_timestep(np.array([low, high])).tolist()
    return high_t, low_t


def simple(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Every (train_steps / n)-th of the model's own levels from the top, rounded down."""
    each, last = max(model.train_steps / n, 1), model.train_steps - 1
    return model.sigmas[[last - min(int(i * each), last) for i in range(n)]]


def beta(model: NoiseModel, n: int, low: float, high: float) -> Array:
    """Quantiles of Beta(0.6, 0.6) (Lee et al. 2024, arXiv:2407.12173), laid over sigma as diffusers and A1111 do."""
    return low + beta_quantile(1 - np.linspace(0, 1, n)) * (high - low)


def beta_quantile(q: Array, a: float = 0.6) -> Array:
    """The inverse of the Beta(a, a) distribution function.

    Its integral from 0 is x^a * sum of (1-a)_k / (k! (a+k)) * x^k (DLMF 8.17.7), which converges fast up to x = 1/2;
    the upper half mirrors the lower. In y = x^a the function is almost straight, so Newton's steps are few.
    """
    terms = np.arange(60)
    rising = np.concatenate(([1.0], np.cumprod((terms[:-1] + 1 - a) / (terms[:-1] + 1))))
    target = np.minimum(q, 1 - q) * math.gamma(a) ** 2 / math.gamma(2 * a)
    y = a * target
    for _ in range(8):
        x = y ** (1 / a)
        integral = y * (x[:, None] ** terms * (rising / (a + terms))).sum(1)
        y = y - (integral - target) * a * (1 - x) ** (1 - a)
    x = y ** (1 / a)
    return np.where(q < 0.5, x, 1 - x)


# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507), the levels published with it for 10 steps.
AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def _align_your_steps(table: tuple[float, ...]) -> Spacing:
    def spacing(model: NoiseModel, n: int, low: float, high: float) -> Array:
        """As its authors (research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html) and diffusers do: the last
        level becomes zero, which leaves as many as steps; other numbers of steps interpolate all of them."""
        return _log_interpolated(table, n + 1)[:-1]

    return spacing


def _log_interpolated(table: tuple[float, ...], n: int) -> Array:
    at = np.linspace(0, len(table) - 1, n)
    return np.asarray(np.exp(np.interp(at, np.arange(len(table)), np.log(table))), np.float64)


SPACINGS: Mapping[str, Spacing] = {
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "normal": normal,
    "beta": beta,
    "ays": _align_your_steps(AYS_SD15),  # of a model of the SDXL kind a pipeline makes it the next but one
    "ays_sd15": _align_your_steps(AYS_SD15),
    "ays_sdxl": _align_your_steps(AYS_SDXL),
}
_SPELLINGS = {
    "sgm": "sgm_uniform", "uniform": "normal", "align_your_steps": "ays", "ays_sd1": "ays_sd15",
    "align_your_steps_sdxl": "ays_sdxl", "align_your_steps_sd15": "ays_sd15",
}  # fmt: skip


def spacing_name(name: str) -> str:
    """The name as `SPACINGS` has it, from a loose spelling; UsageError lists what there is."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_").replace("sgmuniform", "sgm_uniform")
    key = _SPELLINGS.get(key, key)
    if key not in SPACINGS:
        raise unknown("schedule", name, SPACINGS)
    return key


def levels(name: str, model: NoiseModel, n: int, low: float | None = None, high: float | None = None) -> Array:
    """n falling levels from `high` to `low`, by default the model's own range."""
    low = float(model.sigmas[0]) if low is None else low
    high = float(model.sigmas[-1]) if high is None else high
    return model.rounded(SPACINGS[name](model, n, low, high))


def webui_levels(name: str, model: NoiseModel, n: int) -> Array:
    """As AUTOMATIC1111 has them: it keeps the last of Align Your Steps' levels above zero, also for ten steps."""
    table = {"ays": AYS_SD15, "ays_sd15": AYS_SD15, "ays_sdxl": AYS_SDXL}.get(name)
    return model.rounded(_log_interpolated(table, n)) if table else levels(name, model, n)
