"""Corrected Predictions stay Predictions, and the fit finds what a trajectory lacks."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dualout import CleanImage, Denoiser, Dual, Epsilon, InputError, noise, samplers, schedules
from dualout.calibrated import NEUTRAL, Calibrated, Calibration, corrected
from dualout.networks.build import build
from dualout.randomness import mix
from dualout.training import calibrate as calibrating
from dualout.training import starts
from dualout.training.calibrate import RACE, Fit, fit, parameters_of
from dualout.training.comparison import HELD_OUT, PLACES, UPDATES, Comparison, nearest
from dualout.training.distances import Energy, SlicedWasserstein, quantiles
from dualout.training.starts import Start, coordinate_search, trends
from dualout.training.views import FLOOR, LOOKED_AT, Views, Within, whitening

SCHEDULE = schedules.Linear()
MEAN, SPREAD = 0.1, 0.3


def exact(x_t, t):
    """The exact denoiser of data from N(MEAN, SPREAD²)."""
    alpha, sigma, *_ = SCHEDULE.level(t).like(x_t)
    return MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x_t - alpha * MEAN)


class Exact(torch.nn.Module):
    def forward(self, x_t, t):
        return exact(x_t, t)


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


def applied(start, denoiser, sampler):
    values = start.values(denoiser.schedule)
    return Calibrated(denoiser, start.times, values, sampler.clip), sampler.at(start.times)


def test_the_start_that_is_ahead_goes_on():
    """With the exact denoiser 2M is nearer than DDIM from the first; a fit may not begin behind it."""
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(1000), (1, 4, 4))
    how = Fit(iterations=1, batch=64, lr=1e-6, move_times=0, held_out=250)
    sampler, comparison = samplers.DDIM(steps=8, spacing="logsnr"), Comparison(denoiser, data, how)
    uncalibrated = Start(["x0_trend"], sampler.timesteps(SCHEDULE))
    plain, second = (
        comparison.held_out(*applied(s, denoiser, sampler)).distance for s in uncalibrated.alternatives(sampler)
    )
    assert second < 0.9 * plain
    *_, last = fit(denoiser, sampler, data, how, ["x0_trend"])
    assert last.calibration.protocol["begun_as"] == "2M"
    assert last.best == pytest.approx(second, rel=1e-3)
    # a solver of higher order follows the trend itself
    for sampler, followed in ((samplers.DPMSolver(steps=8), False), (samplers.DPMSolver(steps=8, order=1), True)):
        assert [start.second_order for start in uncalibrated.alternatives(sampler)] == [False, followed]


@pytest.mark.parametrize("better", [False, True])
def test_a_solver_of_higher_order_begins_with_its_time_steps_as_they_are_too(monkeypatch, better):
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DPMSolver(steps=4)
    usual = sampler.timesteps(SCHEDULE)
    # the exact denoiser is good at a small last step, and not at a large one
    there = [999, 600, 150, 20] if better else [999, 998, 997, 996]
    calls = []
    monkeypatch.setattr(starts, "moved_times", lambda times, *_: calls.append("start") or there)
    monkeypatch.setattr(calibrating, "moved_times", lambda times, *_: calls.append("half") or times)
    data = MEAN + SPREAD * noise(range(600), (1, 4, 4))
    how = Fit(iterations=4, check_every=2, batch=16, lr=1e-3, held_out=150, own_features=False)
    *_, last = fit(denoiser, sampler, data, how, ["x0_scale"])
    assert list(last.calibration.times) == (there if better else usual)
    # what keeps its time steps keeps them to the end
    assert calls == ["start", *["half"] * better]
    # and nothing is moved where that is not wanted
    calls.clear()
    *_, last = fit(denoiser, sampler, data, dataclasses.replace(how, move_times=0), ["x0_scale"])
    assert (calls, list(last.calibration.times)) == ([], usual)


def test_time_steps_are_moved_once_more_when_the_numbers_are_half_fitted():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=4, spacing="linspace")
    data = MEAN + SPREAD * noise(range(600), (1, 4, 4))
    # numbers that hardly change leave the time steps' two searches alone
    how = Fit(iterations=4, check_every=2, batch=16, lr=1e-9, move_times=1, held_out=150, own_features=False)
    *_, last = fit(denoiser, sampler, data, how, ["x0_scale"])
    comparison = Comparison(denoiser, data, how)
    begun = Start(["x0_scale"], sampler.timesteps(SCHEDULE))
    once = begun.moved(denoiser, sampler, comparison)
    twice = once.moved(denoiser, sampler, comparison)
    assert list(last.calibration.times) == twice.times != once.times
    far = [comparison.held_out(*applied(start, denoiser, sampler)).distance for start in (begun, once, twice)]
    assert last.best == pytest.approx(far[2], rel=1e-5)
    assert far == sorted(far, reverse=True)


def test_all_real_images_decide_and_only_those_of_the_fit_are_followed():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=4)
    how = Fit(batch=64, held_out=64, own_features=False)
    data = MEAN + SPREAD * noise(range(200), (1, 4, 4))
    comparison = Comparison(denoiser, data, how)
    made = sampler.sample(denoiser, noise(mix(how.seed + HELD_OUT, np.arange(64)), (1, 4, 4)))
    every, followed = comparison.views.of(data), comparison.views.of(comparison.real)
    assert len(comparison.real) == 150
    for far, real in ((comparison.held_out(denoiser, sampler).distance, every), (comparison.far(made, 0), followed)):
        views = zip(comparison.views(made), real, strict=True)
        assert float(far) == pytest.approx(sum(float(SlicedWasserstein()(a, b, 0)) for a, b in views), rel=1e-5)


def test_what_is_held_out_does_not_depend_on_how_many_are_made_at_a_time():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDPM(steps=3)
    data, found = MEAN + SPREAD * noise(range(200), (1, 4, 4)), []
    for batch in (100, 64, 7):
        how = Fit(batch=batch, held_out=100, own_features=False)
        found.append(Comparison(denoiser, data, how).held_out(denoiser, sampler))
    for far in found[1:]:
        assert far == pytest.approx(found[0], rel=1e-5)


def test_noises_that_decide_are_none_of_those_that_are_fitted_by_and_follow_the_seed():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=2)
    data, made = MEAN + SPREAD * noise(range(64), (1, 4, 4)), []
    for seed in (0, 10):
        comparison = Comparison(denoiser, data, Fit(seed=seed, own_features=False))
        made += [comparison.made(denoiser, sampler, kind, range(50)) for kind in (HELD_OUT, UPDATES, PLACES)]
    assert len(torch.unique(torch.cat(made).flatten(1), dim=0)) == 6 * 50


def test_a_fit_makes_as_many_images_as_it_says(monkeypatch):
    monkeypatch.setattr(calibrating, "KEPT", -1)
    data, looks = MEAN + SPREAD * noise(range(80), (1, 2, 2)), 0

    class Counting(Exact):
        def forward(self, x_t, t):
            nonlocal looks
            looks += len(x_t)
            return super().forward(x_t, t)

    def made(**settings):
        nonlocal looks
        looks, how = 0, Fit(patience=9, own_features=False, distance="energy", **settings)
        list(fit(Denoiser(Counting(), CleanImage(), SCHEDULE), samplers.DDIM(steps=3), data, how))
        # one batch is a trial; an update makes its images, those steps that have a gradient twice, and that costs two
        return (looks - how.batch) / 3 + (2 + 1 / 3) * (1 + RACE) * how.iterations * how.batch, how.trajectories(3)

    for settings in ({"batch": 40, "held_out": 16, "check_every": 2}, {"batch": 2, "held_out": 50, "check_every": 1}):
        found, said = made(iterations=4, move_times=0, **settings)
        assert found == pytest.approx(said)
    settings = {"iterations": 2, "batch": 2, "held_out": 16, "check_every": 1}
    (unmoved, least), (moved, most) = (made(move_times=n, **settings) for n in (0, 1))
    assert 0.7 * (most - least) < moved - unmoved <= most - least


@pytest.mark.parametrize("sampler", [samplers.DDIM(steps=3), samplers.Heun(steps=3)])
def test_activations_that_need_little_memory_are_kept_and_the_numbers_are_the_same(sampler, monkeypatch):
    denoiser = Denoiser(build("tiny:width=8", 1, 8, 3), Dual(), SCHEDULE).eval()
    how, data = Fit(iterations=2, batch=4, held_out=16, move_times=0), noise(range(64), (1, 8, 8))
    looks, found, kept = 0, [], []

    def count(*_):
        nonlocal looks
        looks += 1

    denoiser.network.register_forward_pre_hook(count)
    for most in (-1, 100_000, 2**30):  # the network keeps some hundreds of kilobytes
        monkeypatch.setattr(calibrating, "KEPT", most)
        looks = 0
        found.append([p.calibration.values for p in fit(denoiser, sampler, data, how)][-1])
        kept.append(looks)
    assert found[0] == found[1] == found[2]
    # all looks of an update but the first have a gradient
    starts = 2 if sampler.order == 1 else 1
    assert kept[0] == kept[1] == kept[2] + starts * how.iterations * (sampler.evaluations - 1)


def test_moving_time_steps_looks_at_no_images_twice():
    denoiser, calls = Denoiser(Exact(), CleanImage(), SCHEDULE), []
    sampler, how = samplers.DDIM(steps=6), Fit(batch=8, move_times=2, held_out=16, own_features=False)
    comparison = Comparison(denoiser, MEAN + SPREAD * noise(range(64), (1, 4, 4)), how)

    class Counting:
        schedule = SCHEDULE

        def __call__(self, x_t, t):
            calls.append(t)
            return denoiser(x_t, t)

    start = Start(["x0_trend"], sampler.timesteps(SCHEDULE), second_order=True)
    found = start.moved(Counting(), sampler, comparison)
    looked = len(calls)

    def far(times):
        return comparison.placed(*applied(dataclasses.replace(start, times=times), Counting(), sampler))

    assert coordinate_search(start.times, 999, far, 2) == found.times
    assert looked < 0.65 * (len(calls) - looked)


def test_a_batch_is_compared_with_all_real_images_at_its_own_ranks():
    ordered = torch.arange(8.0)[None]
    torch.testing.assert_close(quantiles(ordered, 8), ordered)
    torch.testing.assert_close(quantiles(ordered, 4), torch.tensor([[0.5, 2.5, 4.5, 6.5]]))
    torch.testing.assert_close(quantiles(ordered, 16)[:, :3], torch.tensor([[0.0, 0.25, 0.75]]))
    torch.testing.assert_close(quantiles(ordered, 16)[:, -3:], torch.tensor([[6.25, 6.75, 7.0]]))
    x, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).split(25)
    assert SlicedWasserstein()(x, y.repeat(2, 1), 0) == pytest.approx(float(SlicedWasserstein()(x, y, 0)), rel=0.2)


def test_random_directions_are_those_of_the_seed():
    x, y = torch.randn(2, 20, 9)
    few = SlicedWasserstein(directions=3)
    assert few(x, y, 5) == few(x, y, 5) != few(x, y, 6)


def test_gradients_of_the_distances_in_one_dimension_are_those_written_out():
    # nothing to turn: every rank is compared with the real one of that rank, and half of a point with each of two
    made = torch.tensor([[3.0], [1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[-3.0], [2.0], [2.5]], dtype=torch.float64)
    found = SlicedWasserstein(directions=4)(made, real, 0)
    assert found.item() == pytest.approx((0.5 + 1 + 1) / 3)
    (slope,) = torch.autograd.grad(found, made)
    assert slope.flatten().tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])
    # 2·mean|x − y| falls or rises by 2/3 of how many y are on either side, the mean over pairs x, x' by 1/3 of each
    (slope,) = torch.autograd.grad(Energy()(made, real, 0), made)
    assert slope.flatten().tolist() == pytest.approx([2 / 3 - 2 / 3, -2 / 9, -2 / 9 + 2 / 3], abs=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2, 8])
def test_the_sliced_distance_of_what_was_moved_is_the_mean_of_its_shadows(dimensions):
    # along a unit direction u everything moved by |u·v|, whose mean over all u is Γ(D/2) / (√π·Γ((D + 1)/2)) of |v|
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, dimensions, generator=generator, dtype=torch.float64) for n in (20, 1))
    share = math.gamma(dimensions / 2) / (math.pi**0.5 * math.gamma((dimensions + 1) / 2))
    found = SlicedWasserstein(directions=4000)(x + v, x, 0)
    assert float(found) == pytest.approx(share * float(v.norm()), rel=0.05 if dimensions > 1 else 1e-6)


def test_the_energy_distance_of_two_points_is_twice_that_between_them_in_units_of_a_feature():
    for dimensions in (1, 4, 9):
        made, real = torch.zeros(3, dimensions).double(), torch.full((5, dimensions), 0.7).double()
        assert float(Energy()(made, real, 0)) == pytest.approx(2 * 0.7, abs=1e-5)


def test_the_energy_distance_of_unequal_numbers_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [
            Energy()(torch.randn(8, 5, generator=generator), torch.randn(200, 5, generator=generator), 0)
            for _ in range(400)
        ]
    )
    assert abs(found.mean()) < 4 * found.std() / 20


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


def test_the_fit_restores_the_variance_that_few_steps_lose():
    """Five DDIM steps with the exact denoiser shrink Gaussian data; no better denoiser repairs that."""
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(2000), (1, 4, 4))
    sampler = samplers.DDIM(steps=5)
    *_, last = fit(denoiser, sampler, data, Fit(iterations=100, batch=128, lr=0.05, check_every=50))
    seeds = range(10_000, 12_000)
    before = sampler.sample(denoiser, noise(seeds, (1, 4, 4)))
    found = last.calibration
    after = sampler.at(found.times).sample(Calibrated.of(denoiser, found), noise(seeds, (1, 4, 4)))
    assert before.std() < 0.6 * SPREAD
    assert abs(after.std() / SPREAD - 1) < 0.05
    assert abs(after.mean() - MEAN) < 0.02
    assert last.calibration.protocol["held_out_after"] < last.calibration.protocol["held_out_before"]


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDPM(steps=4, variance="small"),
        samplers.UniPC(steps=4),
        samplers.IPNDM(steps=4),
        samplers.DPMSolver(steps=4, order=3),
    ],
)
def test_every_sampler_can_be_calibrated(sampler):
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(300), (1, 4, 4))
    *_, last = fit(denoiser, sampler, data, Fit(iterations=12, batch=64, check_every=6))
    assert last.calibration.protocol["held_out_after"] < last.calibration.protocol["held_out_before"]


def test_with_unipc_numbers_of_eps_count_in_the_first_step_alone():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(64), (1, 4, 4))
    how = Fit(iterations=4, batch=16, check_every=1, move_times=0, held_out=16)
    *_, last = fit(denoiser, samplers.UniPC(steps=4), data, how)
    for name in ("eps_scale", "eps_fine"):
        first, *others = last.calibration.values[name]
        assert first != 1
        assert others == [1.0] * 3
    assert 1 not in last.calibration.values["x0_scale"]


def test_the_network_is_left_alone():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 3, 3, padding=1)
    denoiser = Denoiser(lambda x, t: network(x), Dual(), SCHEDULE)
    before = network.weight.clone()
    list(fit(denoiser, samplers.DDIM(steps=2), torch.randn(100, 1, 4, 4), Fit(iterations=3, batch=16)))
    torch.testing.assert_close(network.weight, before, rtol=0, atol=0)


def test_the_learning_rate_falls_by_a_cosine_from_its_value_to_nothing(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def watched(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    how = Fit(iterations=8, batch=4, lr=0.02, move_times=0, held_out=16, own_features=False)
    list(
        fit(
            Denoiser(Exact(), CleanImage(), SCHEDULE),
            samplers.DDIM(steps=2),
            torch.randn(64, 1, 2, 2),
            how,
            ["x0_scale"],
        )
    )
    assert rates[0] == pytest.approx(how.lr)
    assert rates[4] == pytest.approx(how.lr / 2)
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert [a + b for a, b in zip(rates[1:], rates[:0:-1], strict=True)] == pytest.approx([how.lr] * 7)


@pytest.mark.parametrize("parameterization", [Epsilon(), CleanImage(), Dual(ratio=0.5), Dual(ratio="velocity")])
def test_only_a_ratio_that_is_learned_has_numbers(parameterization):
    ratios = {"ratio_gain", "ratio_shift"}
    assert set(parameters_of(Denoiser(exact, parameterization, SCHEDULE))) == NEUTRAL.keys() - ratios
    assert set(parameters_of(Denoiser(exact, Dual(), SCHEDULE))) == NEUTRAL.keys()


def test_too_few_images():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    with pytest.raises(InputError, match="64 images"):
        next(fit(denoiser, samplers.DDIM(steps=2), torch.zeros(20, 1, 4, 4), Fit()))


@pytest.mark.parametrize(("name", "least"), [("batch", 2), ("held_out", 16), ("move_times", 0)])
def test_settings_of_a_fit_that_cannot_be(name, least):
    Fit(**{name: least})
    with pytest.raises(InputError, match=f"{name} is {least} or more, got {least - 1}"):
        Fit(**{name: least - 1})


def test_nearness_is_the_rms_distance_to_the_nearest_image():
    real = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    made = torch.stack([torch.full((1, 4, 4), 0.25), torch.full((1, 4, 4), 0.9)])
    assert nearest(made, real) == pytest.approx((0.25 + 0.1) / 2, rel=1e-5)
    assert nearest(real, real) == pytest.approx(0, abs=1e-6)


def test_views_are_whitened_where_images_vary():
    """Unit variance along every direction that holds variance; none is made of a direction that holds none."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 3.0, 1.0, 1e-4])
    x = torch.randn(4000, 4, generator=generator) * spread @ torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    # around any mean
    by = whitening(x + 5)
    variance = (x @ by).var(0)
    floor = FLOOR * spread.square().mean()
    torch.testing.assert_close(
        variance / variance[0], (u := spread.square() / (spread.square() + floor)) / u[0], rtol=0.1, atol=1e-6
    )
    assert float(variance.mean()) == pytest.approx(1, rel=1e-2)
    # fewer images than directions: the floor is a share of the mean over all of them
    corners = torch.zeros(4, 9)
    corners[:2, 0], corners[2:, 1] = torch.tensor([3.0, -3.0]), torch.tensor([1.0, -1.0])
    large, small = 6.0, 2 / 3
    floor = FLOOR * (large + small) / 9
    seen = (corners @ whitening(corners)).var(0)
    assert float(seen[1] / seen[0]) == pytest.approx(small / (small + floor) * (large + floor) / large, rel=1e-4)
    assert torch.isfinite(whitening(x[:3])).all()
    assert torch.isfinite(whitening(torch.ones(8, 5))).all()


def test_time_steps_move_to_where_the_distance_is_least():
    best = [990, 700, 300, 60]
    visited = []

    def far(times):
        visited.append(list(times))
        return sum(abs(a - b) for a, b in zip(times, best, strict=True))

    found = coordinate_search([999, 749, 499, 249], 999, far, rounds=6)
    assert far(found) < 0.1 * far([999, 749, 499, 249])
    assert all(999 >= a > b >= 0 for times in visited for a, b in pairwise([*times, -1]) if b >= 0)
    assert coordinate_search([3, 2, 1, 0], 3, far, rounds=5) == [3, 2, 1, 0]  # there is no room


def test_moved_time_steps_are_those_that_are_sampled():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    images = MEAN + SPREAD * torch.randn(512, 1, 4, 4, generator=generator)
    sampler = samplers.DDIM(steps=3, clip=None)
    *_, last = fit(denoiser, sampler, images, Fit(iterations=2, batch=64, move_times=1))
    found = last.calibration
    assert found.sampler == sampler.config()
    assert list(found.times) != sampler.timesteps(SCHEDULE)
    made = sampler.at(found.times).sample(Calibrated.of(denoiser, found), noise(range(2), (1, 4, 4)))
    assert made.isfinite().all()
    with pytest.raises(InputError, match="time steps"):
        sampler.sample(Calibrated.of(denoiser, found), noise(range(2), (1, 4, 4)))


def test_the_networks_own_features_are_those_of_its_bottom():
    denoiser = Denoiser(build("small:width=8", 1, (16, 16), 3), Dual(), schedules.Linear())
    within = Within.of(denoiser, torch.zeros(2, 1, 16, 16))
    assert within.layer == "mid_block"
    assert within.t == 48
    seen = []
    handle = denoiser.network.get_submodule(within.layer).register_forward_hook(
        lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y)
    )
    images = torch.randn(3, 1, 16, 16)
    denoiser(within.alpha * images, within.t)
    handle.remove()
    assert seen[0][0, 0].numel() < 16 * 16
    # and nothing of what comes after is computed
    denoiser.network.get_submodule("up_blocks.0").register_forward_pre_hook(lambda *_: pytest.fail("went on"))
    assert torch.equal(within(images), seen[0].flatten(1))


def test_features_of_a_compiled_network_are_those_of_the_network():
    network, images = build("tiny:width=8", 1, (8, 8), 3), torch.randn(3, 1, 8, 8)
    compiled = Denoiser(torch.compile(network, backend="eager"), Dual(), SCHEDULE)
    within = Within.of(compiled, images)
    compiled(images, 5)  # compiled without a hook, so that none is asked
    assert torch.equal(within(images), Within.of(Denoiser(network, Dual(), SCHEDULE), images)(images))


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.RectifiedFlow()], ids=lambda s: s.name)
def test_the_network_is_asked_at_a_low_noise_level(schedule):
    within = Within(Denoiser(exact, Epsilon(), schedule), "")
    alpha, sigma = (float(table[within.t]) for table in schedule.tables())
    assert sigma / alpha == pytest.approx(LOOKED_AT, rel=0.02)
    assert within.alpha == pytest.approx(alpha)


def test_features_of_a_network_in_half_precision_are_compared_in_float32():
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3).to(torch.bfloat16), Dual(), schedules.Linear())
    assert {view.dtype for view in Views(torch.randn(20, 1, 8, 8), 0, denoiser)(torch.zeros(2, 1, 8, 8))} == {
        torch.float32
    }


def test_pixels_are_seen_as_they_are_and_random_features_bend():
    images = torch.randn(2, 40, 1, 8, 8)
    a, b = images[:, :3]
    one, two, both = (Views(images[0], seed) for seed in (0, 1, 0))
    pixels, *bent = (x + y - z for x, y, z in zip(one(a), one(b), one(a + b), strict=True))
    torch.testing.assert_close(pixels, torch.zeros_like(pixels), rtol=0, atol=1e-4)
    assert all(float(rest.abs().mean()) > 0.1 for rest in bent)
    # and are those of the seed
    assert [torch.equal(x, y) for x, y in zip(one(a), two(a), strict=True)] == [True, False, False]
    assert all(torch.equal(x, y) for x, y in zip(one(a), both(a), strict=True))


def test_images_of_odd_sides_are_seen_to_their_edges():
    # halves are rounded up: 5×7 pixels are 3×4 squares, and 3×4 positions of the first convolution
    views = Views(torch.randn(600, 2, 5, 7), 0)(torch.randn(3, 2, 5, 7))
    assert [view.shape[1] for view in views] == [2 * 3 * 4, 32 * 2 * 2, 64 * 2 * 2]


def test_a_network_that_never_looks_from_afar_has_no_features_of_its_own():
    flat = Denoiser(torch.nn.Sequential(), Epsilon(), schedules.Linear())
    flat.network.forward = lambda x, t: x
    assert Within.of(flat, torch.zeros(2, 1, 8, 8)) is None


def test_views_of_real_images_have_unit_variance_and_pass_gradients():
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3), Dual(), schedules.Linear()).requires_grad_(False)
    images = torch.randn(64, 1, 8, 8)
    views = Views(images, 0, denoiser)
    assert [float(v.var(0).mean()) for v in views(images)] == pytest.approx([1] * 4, rel=1e-3)
    images.requires_grad_()
    views(images)[3].square().sum().backward()
    assert images.grad.abs().sum() > 0
