"""What holds for every noise schedule."""

from __future__ import annotations

import pytest
import torch

from dualout.errors import InputError
from dualout.levels import Level
from dualout.schedules import Schedule
from variants import schedules


def test_names_are_unique() -> None:
    def concrete(cls: type[Schedule]) -> int:
        return sum(concrete(sub) + (sub in Schedule.kinds().values()) for sub in cls.__subclasses__())

    assert len(Schedule.kinds()) == concrete(Schedule) >= 6


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("name", Schedule.kinds())
def test_signal_falls_and_noise_rises(name: str, steps: int) -> None:
    schedule = next(p.values[0] for p in schedules(steps) if p.id == name)
    level = schedule.level(torch.arange(steps))
    alpha, sigma, gain = level.alpha, level.sigma, level.gain
    assert alpha.dtype == sigma.dtype == gain.dtype == torch.float64
    assert alpha.shape == sigma.shape == gain.shape == (steps,)
    assert (alpha > 0).all()
    assert (sigma > 0).all()
    assert (schedule.log_snr.diff() < 0).all()
    assert schedule.log_snr.shape == (steps,)
    torch.testing.assert_close(schedule.log_snr.exp(), alpha**2 / sigma**2)


@pytest.mark.parametrize("schedule", schedules(50))
def test_an_int_a_tensor_and_floats_agree(schedule: Schedule) -> None:
    table = schedule.level(torch.arange(50))
    for t in (0, 1, 25, 49):
        one, plain = schedule.level(t), schedule.scalars(t)
        for name in ("alpha", "sigma", "gain"):
            column, value, number = (getattr(level, name) for level in (table, one, plain))
            assert value.shape == ()
            assert isinstance(number, float)
            assert column[t] == value == number


@pytest.mark.parametrize("schedule", schedules(50))
def test_gain_is_the_posterior_means_slope_in_x0(schedule: Schedule) -> None:
    # q(x_s | x_t, x0) of the Markov chain between adjacent levels, by conditioning a joint Gaussian
    level = schedule.level(torch.arange(50))
    alpha, sigma, gain = level.alpha, level.sigma, level.gain
    before = Level(torch.cat([torch.ones(1).double(), alpha[:-1]]), torch.cat([torch.zeros(1).double(), sigma[:-1]]))
    step = alpha / before.alpha
    slope = before.alpha - step * before.sigma**2 / sigma**2 * alpha
    torch.testing.assert_close(gain, slope, rtol=1e-7, atol=1e-12)
    assert gain[0] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("schedule", schedules(50))
def test_levels_follow_the_images(schedule: Schedule) -> None:
    # as many images as they are wide: (B,) must not be taken for a row of pixels
    t = torch.tensor([0, 7, 21, 49])
    x = torch.ones(4, 3, 4, 4)
    level = schedule.level(t).like(x)
    for value in (level.alpha, level.sigma, level.gain):
        assert value.shape == (4, 1, 1, 1)
        assert value.dtype == torch.float32
    scaled = level.alpha * x
    for b in range(4):
        assert (scaled[b] == schedule.level(t).alpha[b].float()).all()


@pytest.mark.parametrize("schedule", schedules(50))
def test_a_step_outside_is_refused(schedule: Schedule) -> None:
    for t in (-1, 50):
        with pytest.raises(InputError, match="from 0 to 49"):
            schedule.level(t)
        with pytest.raises(InputError, match="from 0 to 49"):
            schedule.scalars(t)
    with pytest.raises(InputError, match=r"torch\.float32"):
        schedule.level(torch.zeros(3))
