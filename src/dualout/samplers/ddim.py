"""DDIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level
from dualout.samplers.base import Sampler, Step, add, combine, visited
from dualout.schedules import Schedule


class _Coefficients(NamedTuple):
    clean: float
    eps: float
    x_t: float
    x0: float
    noise: float | None


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv 2010.02502, equations 12 and 16).

        x_s = alpha_s·clip(x0) + √(sigma_s² − τ²)·eps + τ·z
        τ = eta·(sigma_s/sigma_t)·√(sigma_t² − (alpha_t/alpha_s)²·sigma_s²)

    eps is of the x0 before clipping, as in the authors' code. eta = 0 is deterministic; eta = 1 is DDPM with small
    variance (where nothing is clipped).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is from 0 (deterministic) to 1 (as noisy as DDPM); got {self.eta}")

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return self.eta > 0

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Coefficients]:
        """Coefficients of clip(x0), of eps or the x_t and x0 that it is made of, and of z."""
        levels = visited(schedule, times)
        return [self._coefficients(t, s) for t, s in pairwise(levels)]

    def _coefficients(self, t: Level[float], s: Level[float]) -> _Coefficients:
        added = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
        tau = self.eta * s.sigma / t.sigma * math.sqrt(max(added, 0.0))
        direction = math.sqrt(max(s.sigma**2 - tau**2, 0.0))
        # eps = (x_t − alpha·x0) / sigma, put in
        return _Coefficients(s.alpha, direction, direction / t.sigma, -direction * t.alpha / t.sigma, tau or None)

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        c, p = step.plan, step.prediction
        if p.direct is not None:
            x = add(self.scaled(c.clean, p.x0), (c.eps, p.direct))
        elif self.clip is None:
            x = combine((c.x_t, p.x_t), (c.clean + c.x0, p.x0))
        else:
            x = add(self.scaled(c.clean, p.x0), (c.x_t, p.x_t), (c.x0, p.x0))
        return x if c.noise is None else add(x, (c.noise, step.fresh()))
