"""Linear multistep on eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level
from dualout.samplers.base import Sampler, Step, add, combine, remember, visited
from dualout.schedules import Schedule

LEAST = 5e-6
"""Of alpha: with less, what eps errs by is multiplied by 200,000 and more, and nothing is left of the image."""


class EpsStep(NamedTuple):
    """DDIM's step from t to s with a given eps: alpha_s·clip(x_t/alpha_t − u_t·eps) + sigma_s·eps, u = sigma/alpha."""

    x_t: float
    """1 / alpha_t"""
    eps: float
    """−u_t"""
    alpha: float
    sigma: float

    @classmethod
    def between(cls, t: Level[float], s: Level[float]) -> EpsStep:
        """The step from level t to level s.

        Raises:
            InputError: where alpha is below `LEAST`.
        """
        if t.alpha < LEAST:
            raise InputError(
                f"a step in sigma / alpha, as Heun's and iPNDM's are, cannot begin where alpha is {t.alpha:.1g} and "
                "nothing is left of the image: take ddim, dpmsolver or unipc, or leading spacing"
            )
        return cls(1 / t.alpha, -t.sigma / t.alpha, s.alpha, s.sigma)

    def take(self, sampler: Sampler, x_t: Tensor, eps: Tensor) -> Tensor:
        """The images at s."""
        x0 = combine((self.x_t, x_t), (self.eps, eps))
        return add(sampler.scaled(self.alpha, x0), (self.sigma, eps))


class _Coefficients(NamedTuple):
    step: EpsStep
    mean: tuple[float, ...]
    """Of the latest eps, the one before, …; they sum to 1."""


@dataclass(frozen=True, kw_only=True)
class IPNDM(Sampler):
    """Improved pseudo linear multistep (Zhang & Chen 2023, arXiv 2204.13902, section 3.3), for uneven steps.

    In u = sigma/alpha the equation is d(x_t/alpha)/du = eps. Each step is DDIM's with the mean ē over the step of the
    polynomial through the last values of eps (Adams–Bashforth). For even steps in u its coefficients are iPNDM's,
    (3, −1)/2, (23, −16, 5)/12, (55, −59, 37, −9)/24; fixed ones are of order 1 wherever steps are uneven, as they
    always are, so they are computed for the steps at hand.
    """

    order: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3, 4):
            raise InputError(f"iPNDM has orders 1 to 4; got {self.order!r}")

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Coefficients]:
        """DDIM's coefficients, and those of the last `order` eps."""
        levels = visited(schedule, times)
        u = [level.sigma / level.alpha for level in levels]
        return [
            _Coefficients(EpsStep.between(t, s), adams_bashforth(u[: k + 2], self.order))
            for k, (t, s) in enumerate(pairwise(levels))
        ]

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        remember(step.past, step.prediction.eps, self.order)
        mean = combine(*zip(step.plan.mean, step.past, strict=False))
        return step.plan.step.take(self, step.prediction.x_t, mean)


def adams_bashforth(u: Sequence[float], order: int) -> tuple[float, ...]:
    """Weights of the values at u[−2], u[−3] … in their polynomial's mean from u[−2] to u[−1]."""
    here, there = u[-2], u[-1]
    nodes = (np.array(u[-2::-1][:order]) - here) / (there - here)
    powers = np.arange(len(nodes))
    return tuple(np.linalg.solve(nodes[None, :] ** powers[:, None], 1 / (powers + 1)).tolist())
