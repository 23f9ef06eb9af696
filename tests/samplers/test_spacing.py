"""Which time steps are visited: exactly K, decreasing, where the others put them too."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dualout.errors import InputError
from dualout.samplers import DDIM, SPACINGS
from dualout.samplers.spacing import space
from dualout.schedules import Cosine, Linear, Schedule
from variants import schedule_of, schedules

EVERY = pytest.mark.parametrize("spacing", SPACINGS)


def right(times: list[int], steps: int, total: int) -> bool:
    return len(times) == steps and all(a > b for a, b in zip([total, *times], [*times, -1], strict=True))


@EVERY
@pytest.mark.parametrize("schedule", schedules(50))
def test_exactly_k_for_every_k(spacing: str, schedule: Schedule) -> None:
    for steps in range(1, 51):
        times = space(spacing, schedule, steps)
        assert right(times, steps, 50), (steps, times)
        assert all(type(t) is int for t in times)


@EVERY
@pytest.mark.parametrize("total", [1, 2, 3, 7, 97])
def test_exactly_k_of_any_t(spacing: str, total: int) -> None:
    schedule = schedule_of(Cosine, total)
    for steps in range(1, total + 1):
        assert right(space(spacing, schedule, steps), steps, total)
    assert space(spacing, schedule, total) == [*range(total)][::-1]


@EVERY
def test_exactly_k_of_a_thousand(spacing: str) -> None:
    for schedule in (Linear(), Cosine()):
        for steps in (*range(1, 40), 49, 73, 99, 250, 333, 499, 500, 501, 667, 900, 998, 999, 1000):
            assert right(space(spacing, schedule, steps), steps, 1000)


@EVERY
@pytest.mark.parametrize("steps", [0, -1, 51])
def test_no_other_number_is_taken(spacing: str, steps: int) -> None:
    with pytest.raises(InputError, match=f"from 1 to 50, the length of the schedule; got {steps}"):
        space(spacing, Cosine(50), steps)


def test_where_each_begins_and_ends() -> None:
    ends = {name: (times[0], times[-1]) for name in SPACINGS if (times := space(name, Linear(), 10))}
    assert ends["leading"] == (900, 0)
    assert ends["trailing"] == (999, 99)
    assert ends["linspace"] == ends["quadratic"] == ends["logsnr"] == (999, 0)
    # one step sees the noisiest level, save for leading, which is the image's own side
    assert {name: space(name, Linear(), 1) for name in SPACINGS} == {
        "leading": [0], "trailing": [999], "linspace": [999], "quadratic": [999], "logsnr": [999],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_even_spacings_reach_over_all_of_t(name: str) -> None:
    # also where K does not divide T: whole strides of T // K would leave out up to half
    for steps in (2, 3, 7, 30, 64, 300, 501, 600, 999):
        gaps = -np.diff([1000, *space(name, Linear(), steps), -1])[1:-1]
        assert gaps.max() - gaps.min() <= 1
        assert 1000 - space(name, Linear(), steps)[0] <= -(-1000 // steps)


def test_logsnr_is_even_in_log_snr() -> None:
    schedule = Linear(16000, 1e-4 / 16, 2e-2 / 16)
    times = space("logsnr", schedule, 20)
    gaps = -schedule.log_snr[times].diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(19), rtol=0.1, atol=0)


def test_quadratic_is_even_in_its_root() -> None:
    times = np.sqrt(space("quadratic", Linear(), 21))
    np.testing.assert_allclose(np.diff(times), -np.sqrt(999) / 20, rtol=0.35, atol=0.1)


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_diffusers_visits_the_same(name: str) -> None:
    theirs = DDIMScheduler(timestep_spacing=name)
    # its leading goes by whole strides, and the one step of its linspace is at the clean end
    counts = [k for k in range(2, 1001) if name != "leading" or 1000 % k == 0]
    compared = 0
    for steps in counts[:60] + counts[60::37]:
        theirs.set_timesteps(steps)
        times = theirs.timesteps.tolist()
        if len(times) != steps:
            continue  # its trailing has one too many where a float is rounded up
        exact = [
            Fraction(1000 * k, steps) if name == "trailing" else Fraction(999 * k, steps - 1) for k in range(steps + 1)
        ]
        halves = name != "leading" and any(x.denominator == 2 for x in exact)  # which its floats round either way
        ours = space(name, Linear(), steps)
        assert ours == times or (halves and max(abs(a - b) for a, b in zip(ours, times, strict=True)) == 1)
        compared += not halves
    assert compared >= 15


def test_own_steps_are_taken_as_they_are() -> None:
    assert DDIM(steps=3, spacing=(40, 7, 2)).timesteps(Cosine(50)) == [40, 7, 2]
    assert DDIM(steps=2, spacing=lambda schedule, steps: [schedule.steps - 1, steps]).timesteps(Cosine(50)) == [49, 2]


@pytest.mark.parametrize("times", [(40, 7), (7, 40, 2), (40, 40, 2), (50, 7, 2), (40, 7, -1), ()])
def test_own_steps_are_checked(times: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="3 strictly decreasing integers from 49 to 0, got"):
        DDIM(steps=3, spacing=times).timesteps(Cosine(50))
    with pytest.raises(InputError, match="unknown spacing 'trail'"):
        space("trail", Cosine(50), 3)


@pytest.mark.parametrize("found", [None, 7, [40.0, 7.0, 2.0]])
def test_what_a_function_gives_is_checked(found: object) -> None:
    with pytest.raises(InputError, match="3 strictly decreasing integers from 49 to 0, got"):
        space(lambda schedule, steps: found, Cosine(50), 3)  # type: ignore[arg-type, return-value]
