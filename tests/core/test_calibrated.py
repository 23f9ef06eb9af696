"""Corrected Predictions stay Predictions, and calibrations are written down and known again."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dualout import CleanImage, Denoiser, Dual, InputError, noise, samplers, schedules
from dualout.calibrated import NEUTRAL, Calibrated, Calibration, corrected
from dualout.training.starts import trends
from gaussian import SCHEDULE, exact


def test_corrected_predictions_keep_the_invariant():
    raw = torch.randn(4, 7, 5, 5, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: raw, Dual(), SCHEDULE)
    p = denoiser(torch.randn(4, 3, 5, 5, dtype=torch.float64), 500)
    q = corrected(p, 0.8, 1.1, 1.3, -0.4)
    torch.testing.assert_close(q.level.alpha * q.x0 + q.level.sigma * q.eps, q.x_t)
    logit = raw[:, 6:] * 1.3 - 0.4
    blended = logit.sigmoid() * p.parts["x0"] + (1 - logit.sigmoid()) * (
        (p.x_t - p.level.sigma * p.parts["eps"]) / p.level.alpha
    )
    torch.testing.assert_close(q.x0, 0.8 * blended)
    same = corrected(p)
    torch.testing.assert_close(same.x0, p.x0)
    torch.testing.assert_close(same.x_t, p.x_t)


@pytest.mark.parametrize(("gain", "shift"), [(1.0, 1.0), (1.0, -0.5), (2.0, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_either_number_of_the_ratio_corrects_it(gain, shift):
    raw = torch.randn(4, 7, 5, 5, dtype=torch.float64)
    p = Denoiser(lambda x, t: raw, Dual(), SCHEDULE)(torch.randn(4, 3, 5, 5, dtype=torch.float64), 500)
    q = corrected(p, ratio_gain=gain, ratio_shift=shift)
    ratio = 1 / (1 + (-gain * raw[:, 6:] - shift).exp())
    torch.testing.assert_close(q.parts["ratio"], ratio)
    subtractive = (p.x_t - p.level.sigma * raw[:, :3]) / p.level.alpha
    torch.testing.assert_close(q.x0, subtractive + ratio * (raw[:, 3:6] - subtractive))


@pytest.mark.parametrize("names", [*([name] for name in NEUTRAL), list(NEUTRAL)], ids="-".join)
def test_neutral_numbers_change_nothing(names):
    raw = torch.randn(2, 7, 5, 5, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: raw * (1 + t.view(-1, 1, 1, 1) / 1000), Dual(), SCHEDULE)
    calibrated = Calibrated(denoiser, [999, 500], {name: [NEUTRAL[name]] * 2 for name in names})
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for t in (999, 500):
        plain, p = denoiser(x, t), calibrated(x, t)
        for name in ("x0", "eps", "x_t"):
            torch.testing.assert_close(getattr(p, name), getattr(plain, name), rtol=1e-9, atol=1e-9)


def test_no_more_than_the_last_two_steps_are_remembered():
    calibrated = Calibrated(Denoiser(exact, CleanImage(), SCHEDULE), range(9, -1, -1), {"x0_trend": [0.1] * 10})
    for t in range(9, -1, -1):
        calibrated(torch.zeros(1, 1, 2, 2), t)
        assert len(calibrated._seen) <= 2


def test_only_fine_detail_is_scaled():
    """Squares of 2×2 pixels keep their mean, and what differs from it is scaled; odd sizes are cut short."""
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), CleanImage(), SCHEDULE)
    x0 = torch.tensor([[1.0, 3.0, 5.0], [5.0, 7.0, 9.0], [2.0, 4.0, 6.0]], dtype=torch.float64)
    p = denoiser(torch.randn(1, 1, 3, 3, dtype=torch.float64), 500)
    p = dataclasses.replace(p, x0=x0[None, None])
    q = corrected(p, x0_scale=2.0, x0_fine=0.5)
    by_hand = [[2.5, 3.5, 6.0], [4.5, 5.5, 8.0], [2.5, 3.5, 6.0]]
    torch.testing.assert_close(q.x0[0, 0], 2 * torch.tensor(by_hand, dtype=torch.float64))
    eps = p.eps
    torch.testing.assert_close(corrected(p, eps_fine=0.0).eps[0, 0, :2, :2], eps[0, 0, :2, :2].mean().expand(2, 2))
    torch.testing.assert_close(q.eps, eps)


def test_a_step_by_hand():
    denoiser = Calibrated(
        Denoiser(exact, CleanImage(), SCHEDULE), [999, 499], {"x0_scale": [0.9, 1.2], "eps_scale": [1.1, 1.0]}
    )
    x = noise(range(2), (1, 2, 2), dtype=torch.float64)
    made = samplers.DDIM(steps=2, clip=None).sample(denoiser, x)
    t, s = SCHEDULE.scalars(999), SCHEDULE.scalars(499)
    x0 = exact(x, torch.tensor([999, 999]))
    middle = s.alpha * 0.9 * x0 + s.sigma * 1.1 * (x - t.alpha * x0) / t.sigma
    torch.testing.assert_close(made, 1.2 * exact(middle, torch.tensor([499, 499])))


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
def test_ddim_that_follows_the_trend_is_2m(spacing):
    denoiser, x = Denoiser(exact, CleanImage(), SCHEDULE), noise(range(3), (1, 2, 2), dtype=torch.float64)
    ddim = samplers.DDIM(steps=6, spacing=spacing, clip=None)
    times = ddim.timesteps(SCHEDULE)
    following = Calibrated(denoiser, times, {"x0_trend": trends(times, SCHEDULE)}, clip=None)
    second = samplers.DPMSolver(steps=6, spacing=spacing, clip=None).sample(denoiser, x)
    assert (ddim.sample(denoiser, x) - second).abs().max() > 1e-3
    for _ in range(2):  # of the trajectory before nothing is left
        torch.testing.assert_close(ddim.sample(following, x), second)


@pytest.mark.parametrize(("times", "expected"), [([999], [0]), ([999, 0], [0, 0])])
def test_one_or_two_steps_have_no_trend(times, expected):
    assert trends(times, SCHEDULE) == expected


def test_the_trend_is_of_clipped_images_and_of_the_step_before_even_where_steps_look_twice():
    at = {999: 3.0, 499: 0.5, 249: -0.25}
    denoiser = Denoiser(lambda x, t: torch.full_like(x, at[int(t[0])]), CleanImage(), SCHEDULE)
    following = Calibrated(denoiser, list(at), {"x0_trend": [7.0, 2.0, 0.5]})
    x = torch.zeros(1, 1, 2, 2)
    beliefs = [float(following(x, t).x0.mean()) for t in (999, 499, 499, 249, 249)]
    assert beliefs == [3.0, -0.5, -0.5, -0.625, -0.625]
    p = following(x + 1, 249)
    torch.testing.assert_close(p.level.alpha * p.x0 + p.level.sigma * p.eps, p.x_t)


def test_other_time_steps_are_refused():
    denoiser = Calibrated(Denoiser(exact, CleanImage(), SCHEDULE), [999], {"x0_scale": [1.0]})
    with pytest.raises(InputError, match="time steps"):
        denoiser(torch.zeros(1, 1, 2, 2), 5)


def test_the_command_that_makes_a_missing_one_can_be_pasted(tmp_path):
    (tmp_path / "a run").mkdir()
    with pytest.raises(InputError, match=r"dualout calibrate '.*a run' --sampler ddim --steps 5 --spacing trailing"):
        Calibration.load(tmp_path / "a run", samplers.DDIM(steps=5).config())


def test_what_calibrates_nothing_is_refused():
    denoiser = Denoiser(exact, CleanImage(), SCHEDULE)
    for values in ({"x0_scale": [1.0]}, {"x0_size": [1.0, 1.0]}):
        with pytest.raises(InputError, match=r"one number a step of x0_scale, .*; wrong: "):
            Calibrated(denoiser, [999, 499], values)


def test_numbers_of_numpy_and_torch_are_written_down():
    sampler = samplers.DDIM(steps=2).config()
    written = Calibration(sampler, [999, 499], {"x0_scale": [1.5, 1.0]}).record()
    for kind in (np.array, torch.tensor):
        found = Calibration(sampler, kind([999, 499]), {"x0_scale": kind([1.5, 1.0])})
        assert json.loads(json.dumps(found.record())) == json.loads(json.dumps(written))
        x = torch.ones(1, 1, 2, 2)
        corrected = Calibrated.of(Denoiser(exact, CleanImage(), SCHEDULE), found)
        assert torch.equal(corrected(x, 999).x0, 1.5 * corrected.denoiser(x, 999).x0)


def test_a_time_step_is_known_however_it_is_held():
    denoiser = Calibrated(Denoiser(exact, CleanImage(), schedules.Cosine(50)), [10], {"x0_scale": [1.5]})
    x = torch.ones(2, 1, 2, 2)
    for t in (np.int64(10), torch.tensor(10), torch.tensor([10])):
        assert torch.equal(denoiser(x, t).x0, denoiser(x, 10).x0)
    for t in (torch.tensor([10, 10]), torch.tensor(10.0), 10.0):
        with pytest.raises(InputError, match="this calibration is for the time steps"):
            denoiser(x, t)
