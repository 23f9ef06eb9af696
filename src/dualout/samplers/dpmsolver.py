"""DPM-Solver++, multistep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level
from dualout.samplers.base import Sampler, Step, add, combine, remember, visited
from dualout.schedules import Schedule


class _Coefficients(NamedTuple):
    x_t: float
    noise: float | None
    clean: tuple[float, ...]
    """Of the latest x0, the one before, …"""


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Sampler):
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2): 1M (which is DDIM), 2M or 3M.

    With λ = log(alpha/sigma), h = λ_s − λ_t, the exact solution over a step is

        x_s = (sigma_s/sigma_t)·e^(−ηh)·x_t + alpha_s·X + sigma_s·√(1 − e^(−2ηh))·z
        X = ∫₀ʰ (1+η)·e^((1+η)(u−h)) x0(λ_t + u) du

    η = `eta` says how much noise a step adds: 0 none, 1 as SDE-DPM-Solver++ of the same paper, whose 1M is DDPM with
    small variance; in between as k-diffusion's 2M SDE.

    Order p follows x0 by the polynomial through its last p values. The first steps, and the last one, which goes to a
    level without noise where λ is infinite, are of lower order.

    A polynomial is not followed further than it was fitted over: 3M takes a step that is longer than the two before it
    together by 2M. Even spacing in t ends with such a step, λ being steep near t = 0; the three images would there be
    taken many times each, with both signs, and their errors with them.

    2M is the paper's. Its 3M, in the authors' code and wherever that was copied, adds the second divided difference of
    x0 where the expansion has the second derivative, which is twice that, and so converges with order 2; here it has
    order 3. `published` takes theirs, and with it their rule that below 15 steps the last but one is of order 2.

    2M follows x0 by h/2h₋ of its last change, h₋ the step before, however long a step is. `reach` bounds h/h₋ there:
    2 changes the last step but one of spacings that are even in t, and no trailing one (docs/results/few-steps.md).
    """

    order: int = 2
    published: bool = False
    eta: float = 0.0
    reach: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise InputError(f"DPM-Solver++ has orders 1, 2 and 3; got {self.order!r}")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is from 0 (deterministic) to 1 (SDE-DPM-Solver++); got {self.eta}")
        if self.reach is not None and not (self.reach > 0 and self.order > 1):
            raise InputError(f"reach is above 0, for orders 2 and 3, or null; got {self.reach} for order {self.order}")
        if self.published and (self.eta or self.reach is not None):
            raise InputError("published is the authors' solver without noise, which has no eta and no reach")

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return self.eta > 0

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Coefficients]:
        """Coefficients of x_t, of z and of the last `order` clean images."""
        levels = visited(schedule, times)
        lam = [half_log_snr(level) for level in levels]
        return [self._coefficients(k, levels, lam) for k in range(len(levels) - 1)]

    def _coefficients(self, k: int, levels: Sequence[Level[float]], lam: Sequence[float]) -> _Coefficients:
        t, s = levels[k], levels[k + 1]
        h = lam[k + 1] - lam[k]
        decay, noise = s.sigma / t.sigma, None
        if self.eta and s.sigma:
            decay *= math.exp(-self.eta * h)
            noise = s.sigma * math.sqrt(-math.expm1(-2 * self.eta * h))
        h_eta = (1 + self.eta) * h
        phi = -s.alpha * math.expm1(-h_eta)
        steps = len(levels) - 1
        most = min(2, self.order) if self.published and steps < 15 and k == steps - 2 else self.order
        order = 1 if math.isinf(h) else min(most, k + 1)
        if order == 1:
            return _Coefficients(decay, noise, (phi,))
        r0 = (lam[k] - lam[k - 1]) / h
        if order == 3 and not self.published and h > lam[k] - lam[k - 2]:
            order = 2
        if order == 2:
            r0 = r0 if self.reach is None else max(r0, 1 / self.reach)
            return _Coefficients(decay, noise, (phi * (1 + 0.5 / r0), -phi * 0.5 / r0))
        r1 = (lam[k - 1] - lam[k - 2]) / h
        # h·x0' and h²·x0''/2 at t, from divided differences
        d0, d1 = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
        second = [(a - b) / (r0 + r1) for a, b in zip(d0, d1, strict=True)]
        first = [a + r0 * b for a, b in zip(d0, second, strict=True)]
        # alpha_s ∫₀ʰ (1+η)·e^((1+η)(u−h)) (u/h)^m du, m = 1 and 2
        phi_1 = s.alpha - phi / h_eta
        phi_2 = s.alpha - 2 * phi_1 / h_eta
        if self.published:
            phi_2 /= 2
        clean = tuple(
            phi * one + phi_1 * a + phi_2 * b for one, a, b in zip((1.0, 0.0, 0.0), first, second, strict=True)
        )
        return _Coefficients(decay, noise, clean)

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        remember(step.past, self.clipped(step.prediction.x0), self.order)
        c = step.plan
        x = combine((c.x_t, step.prediction.x_t), *zip(c.clean, step.past, strict=False))
        return x if c.noise is None else add(x, (c.noise, step.fresh()))


def half_log_snr(level: Level[float]) -> float:
    """λ = log(alpha / sigma); infinite without noise."""
    return math.inf if level.sigma == 0 else math.log(level.alpha / level.sigma)
