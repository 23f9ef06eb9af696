"""Heun's method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from dualout.samplers.base import Sampler, Step, combine, visited
from dualout.samplers.ipndm import EpsStep
from dualout.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """Heun's second-order steps (EDM, Karras et al. 2022, arXiv 2206.00364, algorithm 1, without churn).

    In u = sigma/alpha, where d(x_t/alpha)/du = eps: a DDIM step, a second evaluation where it led, and the step again
    with the mean of both eps. The last step, to no noise, has one evaluation, so K steps cost 2K − 1.
    """

    order: int = field(default=2, init=False)

    def looks(self, times: Sequence[int]) -> list[int]:
        """The time step of each call of the network, of K that are visited: all but the first are looked at twice."""
        return [*times[:1], *(t for t in times[1:] for _ in range(2))]

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[EpsStep]:
        """DDIM's coefficients."""
        return [EpsStep.between(t, s) for t, s in pairwise(visited(schedule, times))]

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        c: EpsStep = step.plan
        x_t, eps = step.prediction.x_t, step.prediction.eps
        x_next = c.take(self, x_t, eps)
        if c.sigma == 0:
            return x_next
        eps_next = step.look(x_next, step.k + 1).eps
        return c.take(self, x_t, combine((0.5, eps), (0.5, eps_next)))
