"""Every sampler at every K from 1 to T = 1000: finite, right, and exactly as many evaluations as it declares.

The data are Gaussian pixels, for which a perfect network is known in closed form, and so is the end of each path of
the probability-flow equation. A deterministic sampler must end there, with an error that falls with K at least as that
of first order does; a stochastic one must end in the data's mean and spread.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from campaign.harness import Count, scaled
from dualout.prediction import Prediction
from dualout.samplers import DDIM, DDPM, IPNDM, SPACINGS, DPMSolver, FromDiffusers, Heun, Sampler, UniPC
from dualout.levels import CLEAN
from dualout.schedules import Linear, Schedule

MEAN, SPREAD = 0.3, 0.3
PIXELS = 256

SAMPLERS: tuple[Sampler, ...] = (
    DDIM(clip=None),
    DDIM(eta=1.0, clip=None),
    DDPM(variance="large", clip=None),
    DDPM(variance="small", clip=None),
    *(DPMSolver(order=order, clip=None) for order in (1, 2, 3)),
    DPMSolver(order=3, published=True, clip=None),
    *(UniPC(order=order, clip=None) for order in (1, 2, 3)),
    *(IPNDM(order=order, clip=None) for order in (1, 2, 3, 4)),
    Heun(clip=None),
)
OF_DIFFUSERS = FromDiffusers(scheduler="DDIMScheduler", clip=None)


class Gaussian:
    """The denoiser that makes no error on pixels of N(mean, spread²), and counts how often it is asked."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.calls = schedule, 0
        self.levels = [schedule.scalars(t) for t in range(schedule.steps)]
        self.slopes = [a.alpha * SPREAD**2 / (a.alpha**2 * SPREAD**2 + a.sigma**2) for a in self.levels]

    def __call__(self, x_t: Tensor, t: int, **conditions: object) -> Prediction:
        """E[x0 | x_t]."""
        self.calls += 1
        level, slope = self.levels[t], self.slopes[t]
        return Prediction(x_t, level, x_t * slope + (MEAN - slope * level.alpha * MEAN), {})

    def end(self, x: Tensor, t: int) -> Tensor:
        """Where the probability-flow equation leads from x at step t."""
        level = self.levels[t]
        spread = (level.alpha**2 * SPREAD**2 + level.sigma**2) ** 0.5
        return CLEAN.alpha * MEAN + (x - level.alpha * MEAN) * SPREAD / spread


def faults(sampler: Sampler, denoiser: Gaussian, x: Tensor) -> list[str]:
    """What is wrong with one number of steps."""
    denoiser.calls = 0
    found, times = [], sampler.timesteps(denoiser.schedule)
    end = sampler.sample(denoiser, x)
    if len(set(times)) != sampler.steps or times != sorted(times, reverse=True):
        found.append(f"visits {times[:5]} …")
    if denoiser.calls != sampler.evaluations:
        found.append(f"{denoiser.calls} evaluations, {sampler.evaluations} declared")
    if not torch.isfinite(end).all():
        return [*found, "not finite"]
    if sampler.stochastic and not isinstance(sampler, FromDiffusers):
        # PIXELS draws: four standard errors, and the error of few steps
        mean, spread = float(end.mean()), float(end.std())
        room = 4 * SPREAD / PIXELS**0.5
        if abs(mean - MEAN) > room or not SPREAD * (1 - 6 / sampler.steps) - room <= spread <= SPREAD + room:
            found.append(f"ends at {mean:.3f} ± {spread:.3f} instead of {MEAN} ± {SPREAD}")
        return found
    error = float((end - denoiser.end(x, times[0])).abs().max())
    if error > bound(sampler.steps):
        found.append(f"is {error:.2g} off, {bound(sampler.steps):.2g} allowed")
    return found


def bound(steps: int) -> float:
    """The largest error allowed: first order in K, and at most where all pixels were their mean."""
    return min(4 * SPREAD, 5.0 / steps) + 2e-3


def run(part: float, seed: int) -> Iterator[Count]:
    """Every sampler at every K, the other spacings at every K of their tables."""
    denoiser = Gaussian(Linear())
    last = denoiser.schedule.steps
    x = torch.randn(1, 1, 1, PIXELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every: Sequence[int] = range(1, last + 1)
    if part < 1:
        every = sorted({1, 2, 3, last - 1, last, *random.Random(seed).sample(every, scaled(100, part))})
    torch.manual_seed(seed)
    for sampler in (*SAMPLERS, OF_DIFFUSERS):
        wrong = []
        for steps in every:
            found = faults(dataclasses.replace(sampler, steps=steps), denoiser, x)
            wrong += [f"K = {steps}: {text}" for text in found]
        yield Count(f"every K: {sampler.spec}", len(every), wrong)
    for name, spacing in SPACINGS.items():
        wrong = []
        for steps in every:
            times = spacing(denoiser.schedule, steps)
            decreasing = all(a > b for a, b in pairwise(times))
            if len(times) != steps or not decreasing or not 0 <= times[-1] <= times[0] < last:
                wrong.append(f"K = {steps}: {times[:5]} …")
        yield Count(f"every K: spacing {name}", len(every), wrong)
