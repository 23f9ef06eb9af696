"""Ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from dualout.errors import InputError, unknown
from dualout.levels import Level
from dualout.prediction import Prediction
from dualout.samplers.base import Sampler, Step, add, visited
from dualout.schedules import Schedule

VARIANCES = ("large", "small")
"""What needs nothing of the network."""
LEARNED = "learned"


class _Coefficients(NamedTuple):
    x0: float
    x_t: float
    noise: float | None
    """Standard deviation; the largest, where it is learned."""
    narrowing: float
    """log √(β̃/β)."""


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239, algorithm 2 and equation 7).

    For a step from t to s, with β = sigma_t² − (alpha_t/alpha_s)²·sigma_s² the variance that lies between them,

        x_s = (alpha_s·β/sigma_t²)·clip(x0) + ((alpha_t/alpha_s)·sigma_s²/sigma_t²)·x_t + std·z

    with std² = β ("large") or β̃ = β·sigma_s²/sigma_t² ("small"), or, for networks that learned where between the two,
    β^v·β̃^(1−v) pixel by pixel ("learned"; IDDPM, Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15). β and β̃ are of
    the K steps taken (IDDPM, equation 19). The last step adds no noise.
    """

    variance: str = "large"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in (*VARIANCES, LEARNED):
            raise unknown("variance", self.variance, (*VARIANCES, LEARNED))

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return True

    @property
    def reads_variance(self) -> bool:
        """Whether steps use the variance that a network learned."""
        return self.variance == LEARNED

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Coefficients]:
        """Coefficients of clip(x0), x_t and z, and how far the last can shrink."""
        levels = visited(schedule, times)
        return [self._coefficients(t, s) for t, s in pairwise(levels)]

    def _coefficients(self, t: Level[float], s: Level[float]) -> _Coefficients:
        ratio, kept = t.alpha / s.alpha, s.sigma**2 / t.sigma**2
        beta = max(t.sigma**2 - ratio**2 * s.sigma**2, 0.0)
        noise = math.sqrt(beta * kept if self.variance == "small" else beta) if s.sigma > 0 else None
        narrowing = 0.5 * math.log(kept) if s.sigma > 0 else 0.0
        return _Coefficients(s.alpha * beta / t.sigma**2, ratio * kept, noise, narrowing)

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        c, p = step.plan, step.prediction
        x = add(self.scaled(c.x0, p.x0), (c.x_t, p.x_t))
        variance = _variance(p) if self.variance == LEARNED else None
        if c.noise is None:
            return x
        fresh = step.fresh()
        if variance is not None:
            # √(β^v·β̃^(1−v)) = √β·√(β̃/β)^(1−v)
            fresh = fresh * ((1 - variance) * c.narrowing).exp()
        return add(x, (c.noise, fresh))


def _variance(p: Prediction) -> Tensor:
    if "variance" not in p.parts:
        raise InputError(
            "variance 'learned' needs a network that learned one (dualout.LearnedVariance), which this did not; "
            "take 'large' or 'small'"
        )
    return p.parts["variance"]
