"""UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level
from dualout.samplers.base import Sampler, Step, combine, visited
from dualout.samplers.dpmsolver import half_log_snr
from dualout.schedules import Schedule


class _Update(NamedTuple):
    """x_s from x_t: coefficients of x_t, of x0 at s (the corrector's) and of the x0 at t and before."""

    x_t: float
    ahead: float
    clean: tuple[float, ...]


class _Coefficients(NamedTuple):
    corrector: _Update | None
    """Comes again to this step's images from those of the step before, now that x0 is known here too."""
    predictor: _Update


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniPC with B₂(h) = e^h − 1 (Zhao et al. 2023, arXiv 2302.04867, algorithms 5–8), on x0.

    A multistep predictor of order p (1 to 3) like DPM-Solver++'s, and a corrector that uses the evaluation at the
    predicted images to redo the step that led to them, at no further evaluation. The last steps are of lower order.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise InputError(f"UniPC has orders 1, 2 and 3; got {self.order!r}")

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Coefficients]:
        """The corrector into and the predictor out of each level."""
        levels = visited(schedule, times)
        lam = [half_log_snr(level) for level in levels]
        steps = len(levels) - 1
        order = [min(self.order, k + 1, steps - k) for k in range(steps)]
        return [
            _Coefficients(
                _update(k - 1, order[k - 1], levels, lam, correct=True) if k else None,
                _update(k, order[k], levels, lam, correct=False),
            )
            for k in range(steps)
        ]

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        corrector, predictor = step.plan
        latest = self.clipped(step.prediction.x0)
        x_t = step.prediction.x_t
        if corrector is not None:
            before, *clean = step.past
            x_t = combine(
                (corrector.x_t, before), (corrector.ahead, latest), *zip(corrector.clean, clean, strict=False)
            )
        step.past[:] = [x_t, latest, *step.past[1 : self.order]]
        return combine((predictor.x_t, x_t), *zip(predictor.clean, step.past[1:], strict=False))


def _update(k: int, order: int, levels: Sequence[Level[float]], lam: Sequence[float], *, correct: bool) -> _Update:
    """The step from level k to k + 1, with x0 at levels k, k−1 … and, for the corrector, at k + 1."""
    t, s = levels[k], levels[k + 1]
    h = lam[k + 1] - lam[k]
    first = math.expm1(-h)
    if math.isinf(h):
        return _Update(0.0, 0.0, (-s.alpha * first,))
    # the paper's r_i: where the other x0 lie, in units of the step
    nodes = [(lam[k - i] - lam[k]) / h for i in range(1, order)] + ([1.0] if correct else [])
    moments, phi, factorial = [], first / -h - 1, 1
    for i in range(1, len(nodes) + 1):
        moments.append(phi * factorial / first)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    if len(nodes) == 1:
        rho = [0.5]  # the paper's choice where one unknown remains
    else:
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist() if nodes else []
    # −alpha_s·B·Σ rho_i·(x0_i − x0_k)/r_i, sorted by x0
    weights = [-s.alpha * first * p / r for p, r in zip(rho, nodes, strict=True)]
    ahead = weights.pop() if correct else 0.0
    return _Update(s.sigma / t.sigma, ahead, (-s.alpha * first - sum(weights) - ahead, *weights))
