"""Which K of the T time steps a sampler visits.

Every spacing gives exactly K steps for every K from 1 to T, strictly decreasing. Fractions are exact, and halves
round to even, as in diffusers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from dualout.errors import InputError, unknown
from dualout.schedules import Schedule


def leading(schedule: Schedule, steps: int) -> list[int]:
    """0, T/K, 2T/K …: never visits T−1 (DDIM, Song et al. 2021)."""
    return [k * schedule.steps // steps for k in reversed(range(steps))]


def trailing(schedule: Schedule, steps: int) -> list[int]:
    """T−1, T−1−T/K …: always begins at T−1 (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    return [round(Fraction(schedule.steps * k, steps)) - 1 for k in range(steps, 0, -1)]


def linspace(schedule: Schedule, steps: int) -> list[int]:
    """Both ends, T−1 and 0, and equal distances between (IDDPM, Nichol & Dhariwal 2021)."""
    last = schedule.steps - 1
    return [round(Fraction(last * k, max(steps - 1, 1))) for k in range(steps - 1, 0, -1)] + [0 if steps > 1 else last]


def quadratic(schedule: Schedule, steps: int) -> list[int]:
    """Both ends, and distances that shrink towards t = 0: t = (T−1)·(k/(K−1))².

    DDIM's code (Song et al. 2021, appendix D.2) stops at 0.8·T; this one begins at T−1, as "trailing" does.
    """
    last = schedule.steps - 1
    return _distinct([last * (k / max(steps - 1, 1)) ** 2 for k in range(steps - 1, 0, -1)] + [0.0], last)


def logsnr(schedule: Schedule, steps: int) -> list[int]:
    """Both ends, and equal distances in log(alpha²/sigma²) (DPM-Solver, Lu et al. 2022, section 3.3)."""
    last = schedule.steps - 1
    snr = schedule.log_snr.numpy()
    wanted = np.linspace(snr[-1], snr[0], steps)
    return _distinct(np.interp(wanted, snr[::-1], np.arange(last, -1, -1.0)).tolist(), last)


def _distinct(times: Sequence[float], last: int) -> list[int]:
    """The nearest integers, from `last` down, moved apart where two would be the same."""
    steps = len(times)
    found: list[int] = []
    for k, time in enumerate(times):
        most = found[-1] - 1 if found else last
        found.append(last if k == 0 else min(max(round(time), steps - 1 - k), most))
    return found


Spacing = str | Sequence[int] | Callable[[Schedule, int], list[int]]

SPACINGS: dict[str, Callable[[Schedule, int], list[int]]] = {
    f.__name__: f for f in (leading, trailing, linspace, quadratic, logsnr)
}


def space(spacing: Spacing, schedule: Schedule, steps: int) -> list[int]:
    """K strictly decreasing time steps.

    Args:
        spacing: a name of `SPACINGS`, the steps themselves, or a function that gives them.
        schedule: whose steps they are.
        steps: K.

    Raises:
        InputError: for K < 1 or K > T, an unknown name, or steps that are not strictly decreasing in 0 … T−1.
    """
    if not 1 <= steps <= schedule.steps:
        raise InputError(f"steps is a number from 1 to {schedule.steps}, the length of the schedule; got {steps}")
    if isinstance(spacing, str):
        if spacing not in SPACINGS:
            raise unknown("spacing", spacing, SPACINGS)
        return SPACINGS[spacing](schedule, steps)
    found = spacing(schedule, steps) if callable(spacing) else spacing
    given = list(found) if isinstance(found, Iterable) else [found]
    times = [operator.index(t) for t in given if hasattr(t, "__index__")]
    ordered = len(times) == len(given) and all(a > b for a, b in pairwise(times))
    if len(times) != steps or not ordered or not 0 <= times[-1] <= times[0] < schedule.steps:
        raise InputError(
            f"time steps are {steps} strictly decreasing integers from {schedule.steps - 1} to 0, got {given}"
        )
    return times
