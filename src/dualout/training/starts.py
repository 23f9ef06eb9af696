"""Where a calibration begins: time steps, and numbers that change nothing or make DDIM a solver of second order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dualout.calibrated import NEUTRAL, Calibrated
from dualout.errors import InputError
from dualout.prediction import Prediction
from dualout.samplers.base import Denoises, Sampler
from dualout.samplers.dpmsolver import half_log_snr
from dualout.schedules import Schedule
from dualout.training.comparison import Comparison

Numbers = dict[str, list[float]]
"""The numbers of a calibration by name, one a step."""


@dataclass(frozen=True)
class Start:
    """Time steps, and the numbers that a fit begins with there: those that change nothing, or the trend of 2M.

    Attributes:
        names: of the numbers.
        times: K of them, decreasing.
        second_order: whether the trend is 2M's.
        moves: whether the time steps are moved to where the images are nearer.
    """

    names: Sequence[str]
    times: Sequence[int]
    second_order: bool = False
    moves: bool = True

    def alternatives(self, sampler: Sampler) -> list[Start]:
        """This start, and for a sampler of first order the one that follows x0's trend where there is such a number;
        for one of higher order, whose coefficients follow from its time steps, the one that keeps these."""
        if sampler.order > 1:
            return [self, replace(self, moves=False)] if self.moves else [self]
        follows = "x0_trend" in self.names and len(self.times) > 2
        return [self, replace(self, second_order=True)] if follows else [self]

    def values(self, schedule: Schedule) -> Numbers:
        """By name, one number a step."""
        neutral = {name: [NEUTRAL[name]] * len(self.times) for name in self.names}
        return neutral | ({"x0_trend": trends(self.times, schedule)} if self.second_order else {})

    def moved(self, denoiser: Denoises, sampler: Sampler, comparison: Comparison) -> Start:
        """With the time steps moved to where the images are nearer, if they are to be."""
        if not self.moves:
            return self

        def values(times: Sequence[int]) -> Numbers:
            return replace(self, times=times).values(denoiser.schedule)

        return replace(self, times=moved_times(self.times, values, denoiser, sampler, comparison))


def moved_times(
    times: Sequence[int],
    values: Callable[[Sequence[int]], Mapping[str, Sequence[float]]],
    denoiser: Denoises,
    sampler: Sampler,
    comparison: Comparison,
) -> list[int]:
    """Time steps, moved to where the images are nearer.

    Args:
        times: K of them, decreasing.
        values: the numbers of a calibration that go with given time steps.
        denoiser: uncalibrated.
        sampler: any of the right K.
        comparison: what says how near images are, and in how many rounds steps are moved.

    Raises:
        InputError: for a sampler whose time steps are where they are.
    """
    remembering = _Remembering(denoiser, len(times) + 2)

    def far(tried: Sequence[int]) -> float:
        return comparison.placed(Calibrated(remembering, tried, values(tried), sampler.clip), sampler.at(tried))

    try:
        return coordinate_search(times, denoiser.schedule.steps - 1, far, comparison.how.move_times)
    except InputError as error:
        raise InputError(f"the time steps cannot be moved ({error}); take --move_times 0") from error


class _Remembering:
    """A denoiser that does not look twice at the same images: trajectories differ from one moved time step on.

    Args:
        denoiser: what looks.
        kept: how many of the latest predictions are remembered: those of a trajectory, and of two places of a step.
    """

    def __init__(self, denoiser: Denoises, kept: int) -> None:
        self.denoiser, self.kept = denoiser, kept
        self._known: dict[int, Prediction] = {}

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        known = self._known.pop(int(t), None)
        if known is None or not torch.equal(known.x_t, x_t):
            known = self.denoiser(x_t, t, **conditions)
        # the latest last, so that the oldest is the first to be forgotten
        self._known[int(t)] = known
        if len(self._known) > self.kept:
            del self._known[next(iter(self._known))]
        return known


def trends(times: Sequence[int], schedule: Schedule) -> list[float]:
    """The x0_trend of every step with which DDIM is DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095): h/2h₋.

    The first step has no step before it, and the last, which goes to a level without noise, no finite h: 0.
    """
    lam = [half_log_snr(schedule.scalars(t)) for t in times]
    h = [after - before for before, after in pairwise(lam)]
    return [0.0, *(0.5 * now / before for before, now in pairwise(h)), 0.0][: len(times)]


def coordinate_search(times: Sequence[int], last: int, far: Callable[[Sequence[int]], float], rounds: int) -> list[int]:
    """Time steps, moved towards their neighbours where that brings the images nearer.

    Args:
        times: K of them, decreasing.
        last: T − 1.
        far: how far the images of given time steps are.
        rounds: how often each is tried, by half of the way in the first, half of that in the next, and so on.
    """
    times, best = list(times), far(times)
    for part in range(1, rounds + 1):
        for k in range(len(times)):
            t, above, below = times[k], times[k - 1] if k else last + 1, times[k + 1] if k + 1 < len(times) else -1
            for other in (t + (above - t) // 2**part, t - (t - below) // 2**part):
                if below < other < above and other != t:
                    tried = [*times[:k], other, *times[k + 1 :]]
                    if (distance := far(tried)) < best:
                        times, best = tried, distance
    return times
